"""Models as files for other runtimes: ``torch.export`` programs (.pt2) and ONNX.

What is exported is a model in evaluation form: images -> logits and class maps. The class
representations C_dl are a constant in it; neither the memory nor its noise is.
"""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mcibi_fast import extras, ops
from mcibi_fast.files import write_atomically
from mcibi_fast.inference.folding import folded
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.models.weights import ModelSpec
from mcibi_fast.nn.noise import NoisyMemory
from mcibi_fast.nn.one_logit import two_logits
from mcibi_fast.nn.rows import standard_rows
from mcibi_fast.untrusted import shorten

OPSET = 18  # the lowest that has every operator used here
METADATA = "mcibi_fast.json"  # the specification's name in an ONNX file's metadata and in a .pt2
LARGEST_SIDE = 8192
ERROR_RATIO = 4.0  # allowed error of another runtime in float32, as a multiple of PyTorch's own

Size = tuple[int, int]
Run = Callable[[Tensor], tuple[Tensor, Tensor]]


class EvaluationForm(nn.Module):
    """Images (B, 3, H, W), normalised -> logits (B, K, h, w), class maps (B, H, W) int64.

    A copy of the model in which C_dl is a constant.

    Args:
        model: any :class:`Segmentor`, folded already or not.
        stages: number of stages of iterative inference; None for the model's own.
        fold: fold batch norms and class representations into the weights.

    Raises:
        ValueError: stages of a model without a memory, or a model that estimates optical flow.
    """

    def __init__(self, model: Segmentor, *, stages: int | None = None, fold: bool = True) -> None:
        super().__init__()
        if stages is not None and not model.head.has_memory:
            raise ValueError(f"stages: {type(model.head).__name__} has no memory to iterate with")
        self.model = folded(model) if fold else copy.deepcopy(model).eval().requires_grad_(False)
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, NoisyMemory):
                    setattr(module, name, ConstantRepresentations(child))
        self.options = {} if stages is None else {"stages": stages}
        head = self.eval().model.head
        if head.takes_frames and head.offsets:
            raise ValueError(
                f"export: {type(head).__name__} estimates optical flow between frames, which a "
                "file of one network cannot do; use the model itself (mcibi-fast video)"
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images, **self.options).logits
        height, width = images.shape[2:]
        return logits, self.model.head.class_map(logits, (height, width))


class ConstantRepresentations(nn.Module):
    """What evaluation needs of a memory that draws: C_dl (K, Z), as a constant."""

    table: Tensor
    standard: Tensor

    def __init__(self, memory: NoisyMemory) -> None:
        super().__init__()
        self.num_classes, self.channels = memory.num_classes, memory.channels
        table = memory.representations()
        self.register_buffer("table", table)
        self.register_buffer("standard", standard_rows(table))

    def representations(self) -> Tensor:
        return self.table

    def aggregate(self, weight_logits: Tensor, *, hard: bool = False) -> Tensor:
        """C~_bi (Eq. 12): (B, K, h, w) -> (B, Z, h, w)."""
        return ops.gaussian_aggregate(
            weight_logits, self.standard, self.channels, noise=self.table, hard=hard
        )


def trace(
    form: EvaluationForm, size: Size | None = None, *, standard: bool = False
) -> ExportedProgram:
    """The program of a model, for any batch.

    Args:
        form: what is exported, in any floating point dtype.
        size: (H, W) of the images; None for any size of at least twice the backbone's stride and
            at most 8192.
        standard: use only PyTorch's operators, which every runtime has; these write the upsampled
            logits and the attention's scores to memory. Otherwise the program keeps this package's
            operators, whose kernels are chosen when it runs; ``import mcibi_fast.ops`` before
            loading it.

    Raises:
        ValueError: the model has no program for this size, or none for any size (the message
            says why).
    """
    backbone: Any = form.model.backbone
    if size is None and _has_windows(backbone):
        raise ValueError(
            "export: a backbone with windows has no program for images of any size, as they are "
            "padded to whole windows; give a size, which is then fixed (--size H,W)"
        )
    stride = max(getattr(backbone, "reductions", [32]))
    dims: dict[int, Any] = {0: Dim("batch", max=LARGEST_SIDE)}
    if size is None:
        for axis, name in ((2, "height"), (3, "width")):
            dims[axis] = Dim(name, min=2 * stride, max=LARGEST_SIDE)
    height, width = size or (4 * stride, 6 * stride)
    like = next(form.parameters())
    images = torch.zeros(2, 3, height, width, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        try:
            program = torch.export.export(
                form,
                (images,),
                dynamic_shapes={"images": dims},
                strict=False,
                # Which branch any size takes cannot always be proved; those that could leave it
                # become assertions in the program.
                prefer_deferred_runtime_asserts_over_guards=size is None,
            )
        except Exception as error:  # torch.export raises whatever the model's code does
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            advice = "" if size else "; give a size, which is then fixed (--size H,W)"
            what = f"images of {height}x{width}" if size else "images of any size"
            raise ValueError(
                f"export: this model cannot be traced for {what} ({reason}){advice}"
            ) from error
        if not standard:
            return program
        return program.run_decompositions(
            {**ops.decompositions(), torch.ops.aten.adaptive_avg_pool2d.default: _pool}
        )


def _has_windows(backbone: nn.Module) -> bool:
    """Whether it is a Swin: torch.export cannot handle the sizes of its padded and rolled maps."""
    return any("swin" in type(module).__module__ for module in backbone.modules())


def _pool(maps: Tensor, counts: Sequence[int]) -> Tensor:
    """Adaptive average pooling as two matrix products: (B, C, h, w) -> (B, C, *counts).

    ONNX has no such operator; torch's translation of it is wrong unless the counts divide the size.
    """
    if tuple(counts) == (1, 1):
        return maps.mean((2, 3), keepdim=True)
    rows, columns = (
        _regions(maps.shape[axis], count, maps) for axis, count in zip((2, 3), counts, strict=True)
    )
    return rows @ maps @ columns.mT


def _regions(size: int, count: int, like: Tensor) -> Tensor:
    """(count, size): row i averages the positions of region i."""
    i = torch.arange(count, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)[None, :]
    start, stop = (i * size) // count, ((i + 1) * size + count - 1) // count
    inside = (position >= start) & (position < stop)
    return inside.to(like.dtype) / (stop - start).to(like.dtype)


def save(
    model: Segmentor,
    spec: ModelSpec,
    out: str | Path,
    *,
    size: Size | None = None,
    stages: int | None = None,
    fold: bool = True,
    image: Tensor | None = None,
) -> list[Agreement]:
    """Writes a .onnx or .pt2 file whose outputs were compared with the model's.

    Without a fixed size, outputs are compared for two sizes and two batch sizes, because a program
    that is right for one size may be wrong for others.

    Args:
        model: on the CPU, float32, not folded.
        spec: goes into the file.
        out: its suffix says which kind.
        size, stages, fold: see :func:`trace` and :class:`EvaluationForm`.
        image: (1, 3, H, W), normalised, to compare on; by default random numbers.

    Raises:
        ValueError: no such kind, packages missing, the model cannot be exported, or the outputs
            differ by more than rounding; nothing is written then.
        OSError: the file cannot be written.
    """
    out = Path(out)
    if out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"export: the result is a .onnx or a .pt2 file, not {out}")
    onnx = out.suffix == ".onnx"
    if onnx:
        check_onnx()
    form = EvaluationForm(model, stages=stages, fold=fold)
    program = trace(form, size, standard=onnx)
    with _refusing(out, size):
        content = onnx_bytes(program, spec) if onnx else program_bytes(program, spec)
        run = onnx_runner(content) if onnx else program_runner(content)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, *(size or (192, 256))), (2, *(size or (161, 131)))]
    images = [torch.randn(b, 3, h, w, generator=generator) for b, h, w in shapes]
    if image is not None:
        images[0] = image
    agreements = [compare(model, run, batch, stages=stages) for batch in images]
    for agreement in agreements:
        agreement.check()
    write_atomically(out, content)
    return agreements


@contextmanager
def _refusing(out: Path, size: Size | None) -> Iterator[None]:
    """Turns the many errors of a file that cannot be written or loaded into one ValueError."""
    try:
        yield
    except (ValueError, ImportError, OSError, MemoryError):
        raise
    except Exception as error:  # PyTorch's serializer and onnxruntime raise errors of their own
        what = "images of any size" if size is None else "images of {}x{}".format(*size)
        advice = "give a size, which is then fixed (--size H,W)" if size is None else (
            "use the other kind of file (.pt2 or .onnx)"
        )  # fmt: skip
        raise ValueError(
            f"export: this model for {what} cannot be saved as {out.suffix} "
            f"({shorten(str(error).split(chr(10))[0])}); {advice}"
        ) from error


def program_bytes(program: ExportedProgram, spec: ModelSpec) -> bytes:
    """A .pt2 file's content; the specification is among its extra files."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # PyTorch does not take a weight in channels_last for a whole one, but saves it as it is.
        warnings.filterwarnings("ignore", message="No complete tensor found", category=UserWarning)
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(asdict(spec))})
    return buffer.getvalue()


def onnx_bytes(program: ExportedProgram, spec: ModelSpec) -> bytes:
    """An ONNX file's content: one file, opset 18; the specification is in its metadata.

    Args:
        program: a program of standard operators, see :func:`trace`.

    Raises:
        ValueError: packages are missing, or the file would be over ONNX's 2 GiB.
    """
    check_onnx()
    exported: Any = torch.onnx.export(
        program,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits", "labels"],
        # For the names alone: which sizes are dynamic is in the program.
        dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
        external_data=False,
        verbose=False,
    )
    exported.model.metadata_props[METADATA] = json.dumps(asdict(spec))
    try:
        return exported.model_proto.SerializeToString()
    except ValueError as error:  # protobuf's limit
        raise ValueError(f"export: too large for one ONNX file ({error}); use .pt2") from error


def check_onnx() -> None:
    """Raises ImportError unless the packages for ONNX are there."""
    extras.require("ONNX export", "onnx", "onnxruntime", "onnxscript")


def program_runner(content: bytes) -> Run:
    """Runs a .pt2 file's content."""
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda images: module(images)


def onnx_runner(content: bytes) -> Run:
    """Runs an ONNX file's content on the CPU, with onnxruntime."""
    onnxruntime = extras.load("ONNX export", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own optimisations
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = session.run(["logits", "labels"], {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(labels)

    return run


@dataclass(frozen=True)
class Agreement:
    """How an exported model's outputs and PyTorch's differ on some images.

    Attributes:
        shape: shape of the images.
        error: largest difference of the logits from the model's in float64, divided by the largest
            logit.
        own_error: the same error for the model itself in float32.
        pixels: number of pixels of the class maps.
        mistaken: number of pixels whose class differs from that in float64.
        margin: among these, the largest difference between the right class's logit and that of the
            class that was taken, divided by the largest logit.
    """

    shape: tuple[int, ...]
    error: float
    own_error: float
    pixels: int
    mistaken: int
    margin: float

    @property
    def bound(self) -> float:
        """What counts as rounding: four times PyTorch's own error, and four times the epsilon."""
        return ERROR_RATIO * (self.own_error + torch.finfo(torch.float32).eps)

    def check(self) -> None:
        """Raises ValueError where the outputs differ by more than rounding."""
        shape = "x".join(map(str, self.shape))
        if not self.error <= self.bound:
            raise ValueError(
                f"export: on images of {shape} the logits differ by {self.error:.1e} of the "
                f"largest, PyTorch's own in float32 by {self.own_error:.1e}; not written"
            )
        # Two classes whose logits have errors in opposite directions can change places.
        if not self.margin <= 2 * self.bound:
            raise ValueError(
                f"export: on images of {shape} {self.mistaken} of {self.pixels} pixels have "
                f"another class, by up to {self.margin:.1e} of the largest logit; not written"
            )


@torch.no_grad()
def compare(model: Segmentor, run: Run, images: Tensor, *, stages: int | None = None) -> Agreement:
    """Runs an exported model, the model, and the model in float64.

    Args:
        model: a model in float32.
        run: images -> logits and class maps.
        images: (B, 3, H, W), normalised, float32.
        stages: number of stages of iterative inference.
    """
    options = {} if stages is None else {"stages": stages}
    logits, labels = run(images)
    own = model.eval()(images, **options).logits
    exact = copy.deepcopy(model).double()(images.double(), **options).logits
    scale = float(exact.abs().max())
    upsampled = two_logits(model.head.upsample(exact, labels.shape[1:]))
    lead = upsampled.amax(1) - upsampled.gather(1, labels[:, None])[:, 0]
    return Agreement(
        shape=tuple(images.shape),
        error=float((logits - exact).abs().max()) / scale,
        own_error=float((own - exact).abs().max()) / scale,
        pixels=labels.numel(),
        mistaken=int((lead > 0).sum()),
        margin=float(lead.max()) / scale,
    )

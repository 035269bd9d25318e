"""Table 7: ``python -m benchmarks.table7_contexts [--size 32]``.

Contexts: parameters; multiply-adds at (1, 2048, 128, 128) by the paper's rule and with all
products; time and memory measured at --size; and the published figures. Updates: the cost in
training of updating the memory of MCIBI and of MCIBI++, compared with the released code:

released  upsamples the features to the labels' size, then uses one mask per class
ours      the modules of ``mcibi_fast.nn``
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Candidate, Case, check, check_in_float64
from benchmarks.harness import exit_status, nbytes, write_all
from benchmarks.machine import interleaved, keep_freed_memory, peak_extra_memory
from benchmarks.options import parsed, parser_of
from benchmarks.results import Result, result_of, table
from mcibi_fast.models.counting import Counts, count
from mcibi_fast.nn import (
    ANN,
    ASPP,
    DNL,
    PPM,
    APCNet,
    CCNet,
    DANet,
    DatasetLevelContext,
    GaussianMemory,
    PositionConfidenceAttention,
    RepresentationMemory,
    conv_bn_relu,
)

Memory = GaussianMemory | RepresentationMemory

CHANNELS, Z, K = 2048, 512, 150  # channels of the map and of R, classes of ADE20K


class DCA(nn.Module):
    """The paper's row DCA: Conv3x3 to R, dataset-level context (released form), fusing Conv3x3.

    The logits of W are an input, because Table 7 leaves the classifiers out.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.bottleneck = conv_bn_relu(CHANNELS, Z, 3)
        self.context = DatasetLevelContext(memory)
        self.context.weight_head = nn.Identity()

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        R = self.bottleneck(features)
        C_bi = self.context.aggregate(R, logits)
        return self.context.fuse.conv(torch.cat([R, C_bi], dim=1))


class ASPPWithDCA(nn.Module):
    """The paper's row ASPP+DCA: its bottlenecks are 1x1, and it has a second attention.

    The second attention's query is the context within the image, its key the augmented
    representations.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.within_image = ASPP(CHANNELS, Z)
        self.bottleneck = conv_bn_relu(CHANNELS, Z, 1)
        self.memory = memory
        self.attention = PositionConfidenceAttention(Z)
        self.fuse = conv_bn_relu(2 * Z, Z, 1)
        self.attention_within = PositionConfidenceAttention(Z)
        self.fuse_within = conv_bn_relu(2 * Z, Z, 1)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        within, R = self.within_image(features), self.bottleneck(features)
        context = self.attention(R, self.memory.aggregate(logits))
        augmented = self.fuse(torch.cat([R, context], dim=1))
        both = [self.attention_within(within, augmented), within]
        return self.fuse_within(torch.cat(both, dim=1))


class ReleasedASPPHead(nn.Module):
    """The structure of released checkpoints with ASPP: 3x3 bottlenecks, no extra attention."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.within_image = ASPP(CHANNELS, Z)
        self.dca = DCA(memory)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        return torch.cat([self.dca(features, logits), self.within_image(features)], dim=1)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: the row's name.
        make: builds the module.
        second_input: returns the channels of the second input, if there is one: logits, or the map
            before the last (ANN).
        repeated: parts that the published code runs twice and this module once.
        paper: the paper's figures: parameters in M, FLOPs in G, time in ms and memory in G (on a
            V100); None for a row that is not in the paper.
    """

    name: str
    make: Callable[[], nn.Module]
    second_input: Callable[[], int] | None = None
    repeated: Callable[[nn.Module], Sequence[nn.Module]] = lambda module: ()
    paper: tuple[float, float, float, float] | None = None

    def inputs(self, size: int, device: str) -> tuple[Tensor, ...]:
        channels = [CHANNELS] if self.second_input is None else [CHANNELS, self.second_input()]
        generator = torch.Generator().manual_seed(size)
        return tuple(
            torch.empty(1, c, size, size, device=device)
            if device == "meta"
            else torch.randn(1, c, size, size, generator=generator).relu().to(device)
            for c in channels
        )

    def counts(self, size: int = 128) -> Counts:
        """Counts at (1, 2048, size, size), without allocating memory."""
        with torch.device("meta"):
            module = self.make()
        module = module.to("meta").eval()
        return count(module, *self.inputs(size, "meta"), repeated=self.repeated(module))


def logits() -> int:
    return K


def gaussian() -> GaussianMemory:
    return GaussianMemory(K, Z)


def representations() -> RepresentationMemory:
    """MCIBI's memory with one representation per class, as in its paper's tables."""
    memory = RepresentationMemory(K, Z)
    generator = torch.Generator("cpu").manual_seed(0)
    memory.memory.copy_(torch.randn(K, 1, Z, generator=generator, device="cpu").relu())
    return memory


ROWS = [
    Row("ASPP", lambda: ASPP(CHANNELS, Z), paper=(42.21, 674.47, 101.44, 1.68)),
    Row("PPM", lambda: PPM(CHANNELS, Z), paper=(23.07, 309.45, 29.57, 0.97)),
    Row("CCNet", lambda: CCNet(CHANNELS, Z), paper=(23.92, 397.38, 56.90, 1.27)),
    Row("DANet", lambda: DANet(CHANNELS, Z), paper=(23.92, 392.02, 62.64, 5.16)),
    Row(
        "ANN",
        lambda: ANN(CHANNELS // 2, CHANNELS, Z),
        second_input=lambda: CHANNELS // 2,
        repeated=lambda module: [module.context.query],  # one projection for query and key
        paper=(20.32, 335.24, 49.66, 2.28),
    ),
    Row("DNL", lambda: DNL(CHANNELS, Z), paper=(24.12, 395.25, 68.62, 5.02)),
    Row("APCNet", lambda: APCNet(CHANNELS, Z), paper=(30.46, 413.12, 54.20, 2.03)),
    Row("DCA, MCIBI", lambda: DCA(representations()), logits, paper=(14.82, 242.80, 47.64, 3.65)),
    Row(
        "ASPP+DCA, MCIBI",
        lambda: ASPPWithDCA(representations()),
        logits,
        paper=(45.63, 730.56, 125.03, 5.28),
    ),
    Row("DCA, MCIBI++", lambda: DCA(gaussian()), logits, paper=(14.82, 242.80, 44.45, 2.96)),
    Row(
        "ASPP+DCA, MCIBI++",
        lambda: ASPPWithDCA(gaussian()),
        logits,
        paper=(45.63, 730.56, 112.64, 4.59),
    ),
    Row("ASPP+DCA, released", lambda: ReleasedASPPHead(gaussian()), logits),
]


# ---- contexts, measured ------------------------------------------------------


@torch.no_grad()
def measure_contexts(size: int, device: str, budget: float) -> list[dict[str, Any]]:
    """Counts at 128 x 128; time, and memory besides weights and inputs, at ``size``."""
    runs, counts = [], []
    for row in ROWS:
        counts.append(row.counts())
        module, inputs = row.make().to(device).eval(), row.inputs(size, device)
        agreement(row, module, device)
        runs.append(functools.partial(torch.no_grad()(module), *inputs))
    rows = []
    seconds = interleaved(runs, device, budget)
    ours = statistics.median(seconds[[row.name for row in ROWS].index("DCA, MCIBI++")])
    for row, c, run, times in zip(ROWS, counts, runs, seconds, strict=True):
        paper = row.paper or (None,) * 4
        median = statistics.median(times)
        rows.append(
            {
                "context": row.name,
                "params_M": round(c.parameters / 1e6, 2),
                "printed_G": round(c.printed / 1e9, 2),
                "true_G": round(c.true / 1e9, 1),
                "size": size,
                "median_ms": 1e3 * median,
                "times_DCA": median / ours,
                "extra_MiB": peak_extra_memory(run, device),
                "GMAC_per_s": row.counts(size).true / median / 1e9,
                "paper_params_M": paper[0],
                "paper_printed_G": paper[1],
                "paper_ms": paper[2],
                "paper_memory_G": paper[3],
            }
        )
    return rows


def agreement(row: Row, module: nn.Module, device: str) -> None:
    """Compares the module, on a small map, with itself in float64 with the ops' references."""
    check_in_float64(row.name, {"map": 9}, module, row.inputs(9, device))


# ---- updates -----------------------------------------------------------------


def released_statistics(
    memory: Tensor, features: Tensor, labels: Tensor, momentum: float
) -> Tensor:
    """MCIBI++'s update as the released code computes it."""
    memory = memory.clone()
    for k, pixels in _pixels_of_classes(features, labels):
        mean = pixels.mean(0)
        new = torch.stack([mean.mean(), mean.std()])
        memory[k] = (1 - momentum) * memory[k] + momentum * new
    return memory


def released_representations(
    memory: Tensor, features: Tensor, labels: Tensor, momentum: float, cosine: bool
) -> Tensor:
    """MCIBI's update as the released code computes it, for classes seen before and n = 1."""
    memory = memory.clone()
    for k, pixels in _pixels_of_classes(features, labels):
        target = pixels.mean(0)
        if cosine:
            weights = 1 - F.cosine_similarity(pixels, memory[k].expand_as(pixels))
            target = (pixels * (weights / weights.sum())[:, None]).sum(0)
        memory[k] = (1 - momentum) * memory[k] + momentum * target
    return memory


def _pixels_of_classes(features: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    size = labels.shape[1:]
    upsampled = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
    rows = upsampled.permute(0, 2, 3, 1).contiguous().flatten(0, 2)
    for k in labels.unique().tolist():
        yield k, rows[labels.flatten() == k]


@torch.no_grad()
def measure_updates(size: int, device: str, budget: float) -> list[dict[str, Any]]:
    """Bytes of each memory; time and peak memory of an update, with labels of 8 times ``size``."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(1, Z, size, size, generator=g).relu().to(device)
    labels = torch.randint(K, (1, size // 4, size // 4), generator=g)  # patches of 32 x 32
    labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2).to(device)
    mean = RepresentationMemory(K, Z, strategy="mean")
    mean.load_state_dict(representations().state_dict())
    rows = []
    for name, module, released in (
        ("MCIBI++", gaussian(), released_statistics),
        ("MCIBI, mean", mean, functools.partial(released_representations, cosine=False)),
        (
            "MCIBI, cosine",
            representations(),
            functools.partial(released_representations, cosine=True),
        ),
    ):
        module = module.to(device)
        start = module.memory.clone()

        def ours(module: Memory = module, start: Tensor = start) -> Tensor:
            module.memory.copy_(start)
            module.update(features, labels)
            return module.memory

        runs = [functools.partial(released, start, features, labels, module.momentum), ours]
        candidates = [Candidate("released", runs[0]), Candidate("ours", ours)]
        check(Case(name, {"map": size, "K": K}, torch.float32, candidates, bytes=0, flops=0))
        seconds = interleaved(runs, device, budget / 3)
        for candidate, times in zip(candidates, seconds, strict=True):
            rows.append(
                {
                    "memory": name,
                    "candidate": candidate.name,
                    "memory_bytes": nbytes(module.memory),
                    "median_ms": 1e3 * statistics.median(times),
                    "times_ours": statistics.median(times) / statistics.median(seconds[1]),
                    "extra_MiB": peak_extra_memory(candidate.run, device),
                }
            )
    return rows


# ---- the results -------------------------------------------------------------


def run(device: str, size: int, update_size: int = 64, budget: float = 20) -> list[Result]:
    """Measures and prints both tables: the contexts, and the updates of the memories."""
    if device == "cpu":
        keep_freed_memory()
    contexts = result_of("table7_contexts", device, ("context", "size"))
    contexts["rows"] = measure_contexts(size, device, budget)
    updates = result_of("table7_updates", device, ("memory",))
    updates["rows"] = measure_updates(update_size, device, budget)
    where = contexts["environment"]
    print(f"Table 7 on {where['device']}, {where['threads']} threads; paper: V100, 128 x 128")
    print(table(contexts["rows"], digits=2))
    print(f"\nupdates, features {update_size} x {update_size}, labels 8 times that, K = {K}")
    print(table(updates["rows"], digits=2))
    return [contexts, updates]


def main() -> int:
    parser = parser_of(__doc__.splitlines()[0], threads=1)
    parser.add_argument("--size", type=int, help="size of the map (default: 32, on a GPU 128)")
    parser.add_argument("--budget", type=float, default=20, help="seconds per table (default: 20)")
    options = parsed(parser)
    size = options.size or (128 if options.device == "cuda" else 32)
    return exit_status(
        lambda: write_all(run(options.device, size, budget=options.budget), options.out)
    )


if __name__ == "__main__":
    sys.exit(main())

"""Optical flow for temporal consistency, and warping by the flow.

`RAFTFlow` is the flow that VSPW's evaluation used (torchvision's port with the Chairs+Things
weights). `DISFlow` needs no weights and no GPU. `default_flow` takes RAFT if its weights are
available.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast import extras
from mcibi_fast.protocols import check_protocol
from mcibi_fast.terminal import printable
from mcibi_fast.untrusted import read_torch

_RAFT_STRIDE = 8
_RAFT_SMALLEST = 128  # RAFT's correlation pyramid has four levels at stride 8
_DAMAGED = (RuntimeError, EOFError, UnpicklingError)  # what torch.load raises for damaged files


class FlowFunction(Protocol):
    """A function from two frames to the flow between them; tables of results print its ``name``."""

    @property
    def name(self) -> str: ...

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Two frames (3, H, W) uint8 RGB -> flow (2, H, W) float32, x and y in pixels."""
        ...


class RAFTFlow:
    """torchvision's ``raft_large`` with the original Chairs+Things weights (``C_T_V1``).

    Frames are padded evenly to multiples of 8 by repeating their border pixels, as in VSPW's
    evaluation.

    Args:
        weights: a file with the state dictionary; None lets torchvision find or download it.
        device: the device on which it runs.
        iterations: number of updates of the flow.

    Raises OSError if there are no weights, and ValueError if torchvision cannot be imported, the
    file holds other weights, or a side of the frames is below 128 after padding.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        iterations: int = 20,
    ) -> None:
        if iterations < 1:
            raise ValueError(f"iterations: {iterations}, expected at least 1")
        models = extras.load("RAFT", "torchvision.models.optical_flow")
        if weights is None:
            published = models.Raft_Large_Weights.C_T_V1
            try:
                model = models.raft_large(weights=published)
            except (OSError, *_DAMAGED) as error:  # torch.hub: RuntimeError for a wrong hash
                raise OSError(
                    f"RAFT's weights ({published.url}) cannot be loaded: {error or 'empty file'}; "
                    f"give the path of a file with them, or use DIS; torch keeps downloads in "
                    f"{torch.hub.get_dir()}/checkpoints"
                ) from error
        else:
            model = models.raft_large(weights=None)
            try:
                model.load_state_dict(read_torch(Path(weights)))
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{weights}: not the weights of raft_large") from error
        self.model: Any = model.to(device).eval()
        self.device, self.iterations = torch.device(device), iterations
        which = "Chairs+Things, C_T_V1" if weights is None else printable(Path(weights).name)
        self.name = f"RAFT (torchvision raft_large, {which}, {iterations} iterations)"

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        _check_frames(first, second)
        height, width = first.shape[-2:]
        down, right = -height % _RAFT_STRIDE, -width % _RAFT_STRIDE
        if not _large_enough(height, width):
            raise ValueError(
                f"first: {height}x{width} is too small for RAFT, which needs at least "
                f"{_RAFT_SMALLEST}x{_RAFT_SMALLEST}; use DIS (DISFlow)"
            )
        pad = [right // 2, right - right // 2, down // 2, down - down // 2]
        frames = torch.stack([first, second]).to(self.device).float() / 127.5 - 1
        frames = F.pad(frames, pad, mode="replicate")
        flows = self.model(frames[:1], frames[1:], num_flow_updates=self.iterations)
        return flows[-1][0, :, pad[2] : pad[2] + height, pad[0] : pad[0] + width]


class DISFlow:
    """OpenCV's dense inverse search (Kroeger et al., 2016), medium preset, on the CPU.

    Raises ValueError if OpenCV is missing.
    """

    def __init__(self) -> None:
        self._cv2 = cv2 = extras.load("DIS optical flow", "cv2")
        self._search = self._cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self.name = f"DIS (OpenCV {cv2.__version__}, medium preset)"

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        _check_frames(first, second)
        grey = [
            self._cv2.cvtColor(
                frame.permute(1, 2, 0).contiguous().cpu().numpy(), self._cv2.COLOR_RGB2GRAY
            )
            for frame in (first, second)
        ]
        flow = self._search.calc(*grey, None)
        return torch.from_numpy(flow).permute(2, 0, 1).contiguous().to(first.device)


def default_flow(
    device: torch.device | str = "cpu", size: tuple[int, int] | None = None
) -> FlowFunction:
    """`RAFTFlow` if its weights are available, otherwise `DISFlow`; the flow's name says which.

    Args:
        device: the device on which RAFT runs.
        size: (H, W) of the frames, if known: RAFT cannot process small ones.

    Raises ValueError if neither is available.
    """
    if size is not None and not _large_enough(*size):
        return DISFlow()
    try:
        return RAFTFlow(device=device)
    except (OSError, ValueError):  # no network and no cached file, or no torchvision
        return DISFlow()


def _large_enough(height: int, width: int) -> bool:
    """Whether frames of this size are large enough for RAFT after padding."""
    smaller = min(height, width)
    return smaller + -smaller % _RAFT_STRIDE >= _RAFT_SMALLEST


def warp_backward(labels: Tensor, flow: Tensor, protocol: str) -> Tensor:
    """The next frame's labels, moved to this frame: labels[p + flow(p)], nearest, 0 outside.

    Args:
        labels: (H, W) integers, the labels of the next frame.
        flow: (2, H, W), x and y in pixels, from this frame to the next.
        protocol: "vspw2021": as in VSPW's evaluation, the grid is scaled for ``align_corners=True``
            but sampled with False, which reads x W / (W - 1) - 1/2 instead of x; "strict": both
            use False, which reads x.

    Returns:
        (H, W) int64.
    """
    check_protocol(protocol)
    height, width = labels.shape
    if flow.shape != (2, height, width):
        raise ValueError(
            f"flow: expected shape {(2, height, width)} to fit the labels, got {tuple(flow.shape)}"
        )
    flow = flow.to(labels.device, torch.float32)
    rows = torch.arange(height, device=labels.device, dtype=torch.float32)[:, None]
    columns = torch.arange(width, device=labels.device, dtype=torch.float32)[None, :]
    x, y = columns + flow[0], rows + flow[1]
    if protocol == "vspw2021":
        x, y = 2.0 * x / max(width - 1, 1) - 1.0, 2.0 * y / max(height - 1, 1) - 1.0
    else:
        x, y = (2.0 * x + 1.0) / width - 1.0, (2.0 * y + 1.0) / height - 1.0
    warped = F.grid_sample(
        labels[None, None].float(),  # class indices are exact in float32
        torch.stack([x, y], -1)[None],
        mode="nearest",
        padding_mode="zeros",
        align_corners=False,
    )
    return warped[0, 0].to(torch.int64)


def _check_frames(first: Tensor, second: Tensor) -> None:
    for name, frame in (("first", first), ("second", second)):
        if frame.dtype != torch.uint8 or frame.dim() != 3 or frame.shape[0] != 3:
            raise ValueError(
                f"{name}: expected (3, H, W) uint8, got {tuple(frame.shape)} {frame.dtype}"
            )
    if first.shape != second.shape:
        raise ValueError(
            f"second: shape {tuple(second.shape)} differs from first's {tuple(first.shape)}"
        )

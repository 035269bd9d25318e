"""Speed of the whole head: ``python -m benchmarks.bench_head [--quick]``.

The input is the backbone's last map (1, 2048, h, h); K = 150. Two parts of the head are timed:

dca            Table 7's DCA: bottleneck, C_bi and the fusing convolution, for given logits of W
fcn_mcibipp    the head of FCN + MCIBI++: the same with H_pr and the decoder, up to the logits

convolutions   only the two 3x3 convolutions, which both candidates have: no head can be faster
released       the structure of the released code (`benchmarks.released_structure`)
ours           ``models.MCIBIPPHead``

"forward" runs in evaluation mode; "forward+backward" in training mode without dropout, and computes
the gradients of the map and of all parameters. On a GPU float32 does not use TF32.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import released_structure
from benchmarks.cases import Candidate, Case
from benchmarks.harness import command_line, nbytes, randn, run_cases, seeded
from benchmarks.results import Result
from mcibi_fast.models import MCIBIPPHead

K, CHANNELS = 150, 2048
Run = Callable[..., Tensor]


def make_head(form: Any, dtype: torch.dtype, device: str) -> MCIBIPPHead:
    options = {"form": form, "noise": "released", "dropout": 0.0, "auxiliary_weight": 0.0}
    head: MCIBIPPHead = seeded(MCIBIPPHead, K, [CHANNELS], **options)
    head.memory.memory[:, 0] = randn(K, device="cpu")
    head.memory.memory[:, 1] = randn(K + 1, device="cpu")[1:].abs()
    return head.to(device, dtype)


def ours(cut: str, head: MCIBIPPHead) -> Run:
    if cut == "dca":
        return lambda x, logits: head.context.augment(head.bottleneck(x), logits)
    return lambda x, logits: head([x]).logits


def released(cut: str, head: MCIBIPPHead) -> Run:
    if cut == "dca":
        return lambda x, logits: released_structure.augment(
            head.context, head.bottleneck(x), logits
        )
    theirs = released_structure.ReleasedHead(head)
    return lambda x, logits: theirs([x]).logits


def convolutions(head: MCIBIPPHead) -> Run:
    """The convolution to R and that of F_T, without what comes between them."""
    first, second = head.bottleneck[0], head.context.fuse.conv[0]

    def run(x: Tensor, logits: Tensor) -> Tensor:
        R = F.conv2d(x, first.weight, padding=1)
        return F.conv2d(torch.cat([R, R], 1), second.weight, padding=1)

    return run


def weights_of(cut: str, head: MCIBIPPHead) -> list[nn.Parameter]:
    """The parameters whose gradients are computed.

    Biases are left out if a batch norm or the softmax cancels them: their gradients are zero up to
    rounding.
    """
    parts: list[nn.Module] = [head.bottleneck, head.context.attention, head.context.fuse]
    if cut != "dca":
        parts += [head.context.weight_head, head.decoder]
    return [p for part in parts for p in part.parameters() if p.ndim > 1]


def forward(run: Run, head: MCIBIPPHead, inputs: list[Tensor]) -> Tensor:
    head.eval()
    with torch.no_grad():
        return run(*inputs)


def backward(
    run: Run, head: MCIBIPPHead, inputs: list[Tensor], parameters: list[Tensor]
) -> list[Tensor]:
    """The gradients of the map and of the parameters."""
    head.train()
    x = inputs[0].detach().requires_grad_()
    result = run(x, *inputs[1:])
    grad = _cotangent(result)
    return list(torch.autograd.grad(result, [x, *parameters], grad))


def _cotangent(result: Tensor) -> Tensor:
    return _normal(result.shape, str(result.device), result.dtype)


@functools.lru_cache(maxsize=2)
def _normal(shape: torch.Size, device: str, dtype: torch.dtype) -> Tensor:
    return randn(*shape, device=device, dtype=torch.bfloat16).to(dtype)


def case(cut: str, size: int, form: str, direction: str, dtype: torch.dtype, device: str) -> Case:
    head = make_head(form, dtype, device)
    x = randn(1, CHANNELS, size, size, device=device, dtype=dtype).relu()
    logits = 3 * randn(1, K, size, size, device=device, dtype=dtype)
    both = direction != "forward"

    def runner(run: Run, head: MCIBIPPHead, inputs: list[Tensor], part: bool = False) -> Any:
        if not both:
            return functools.partial(forward, run, head, inputs)
        parameters: list[Any] = weights_of(cut, head)
        if part:
            parameters = [head.bottleneck[0].weight, head.context.fuse.conv[0].weight]
        return functools.partial(backward, run, head, inputs, parameters)

    def truth() -> Any:
        wide = make_head(form, torch.float32, device)
        wide.load_state_dict(head.state_dict())
        return runner(released(cut, wide), wide, [x.float(), logits.float()])()

    inputs = [x, logits]
    weights = [head.bottleneck[0].weight, head.context.fuse.conv[0].weight]
    return Case(
        "head",
        {"head": cut, "form": form, "K": K, "map": size, "direction": direction},
        dtype,
        [
            Candidate("released", runner(released(cut, head), head, inputs)),
            Candidate("ours", runner(ours(cut, head), head, inputs)),
        ],
        parts=[Candidate("convolutions", runner(convolutions(head), head, inputs, part=True))],
        bytes=(3 if both else 1) * nbytes(x, *weights),
        flops=(3 if both else 1) * 2 * size**2 * sum(w.numel() for w in weights),
        # A ReLU's input near zero makes gradients differ; tests/benchmarks compares in float64.
        tolerance=1e-2 if both else None,
        euclidean=both,
        truth=None if dtype == torch.float32 else truth,
    )


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    size = (64 if quick else 128) if device == "cuda" else 32 if quick else 64
    for dtype in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,):
        for cut in ("dca", "fcn_mcibipp"):
            for form in ("paper", "released"):
                for direction in ("forward",) if quick else ("forward", "forward+backward"):
                    yield functools.partial(case, cut, size, form, direction, dtype, device)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``."""
    return [run_cases("head", cases(device, quick), device, quick)]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))

"""Calls torch.ops.mcibi_fast_cuda of the library named on the command line, which takes CPU
tensors, and compares with the reference."""

from __future__ import annotations

import sys

import torch
from in_place import load_in_place  # this script's folder is on the path

from mcibi_fast.ops.gaussian_aggregate import reference


def main(library: str) -> None:
    load_in_place(library, "_cuda.so")
    ops = torch.ops.mcibi_fast_cuda
    generator = torch.Generator().manual_seed(0)
    B, K, h, w, Z = 2, 6, 5, 7, 12
    memory = torch.rand(K, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(K, Z, generator=generator, dtype=torch.float64)
    state = torch.tensor([3, 4])
    table = reference.gaussian_table(memory, Z, noise)
    assert torch.equal(ops.gaussian_table(memory, Z, noise), table)
    assert ops.gaussian_table(memory, Z, state).dtype == torch.float32

    for layout in (torch.contiguous_format, torch.channels_last):
        logits = torch.randn(B, K, h, w, generator=generator, dtype=torch.float64)
        logits = logits.contiguous(memory_format=layout).requires_grad_()
        grad = torch.randn(B, Z, h, w, generator=generator, dtype=torch.float64)
        exact, exact_lse = reference.gaussian_aggregate(logits, memory, Z, noise, False)
        (exact_grad,) = torch.autograd.grad(exact, logits, grad)
        logits = logits.detach()
        out, lse = ops.gaussian_aggregate(logits, memory, Z, noise, False)
        grad_logits = ops.gaussian_aggregate_backward(grad, logits, lse, memory, noise)
        for found, expected in ((out, exact), (lse, exact_lse), (grad_logits, exact_grad)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert out.is_contiguous(memory_format=layout)
        assert grad_logits.is_contiguous(memory_format=layout)
        hard, _ = ops.gaussian_aggregate(logits, memory, Z, noise, True)
        assert torch.equal(hard, table[logits.argmax(1)].permute(0, 3, 1, 2))

    for bad in [
        lambda: ops.gaussian_table(memory[:, :1], Z, noise),
        lambda: ops.gaussian_table(memory, Z + 1, noise),
        lambda: ops.gaussian_table(memory, 0, noise[:, :0]),
        lambda: ops.gaussian_table(memory, Z, noise.half()),
        lambda: ops.gaussian_table(memory.half(), Z, noise),
        lambda: ops.gaussian_table(memory, Z, state[:1]),
        lambda: ops.gaussian_aggregate(logits[0], memory, Z, noise, False),
        lambda: ops.gaussian_aggregate(logits[:, 1:], memory, Z, noise, False),
        lambda: ops.gaussian_aggregate(logits[:0], memory, Z, noise, False),
        lambda: ops.gaussian_aggregate(logits.long(), memory, Z, noise, False),
        lambda: ops.gaussian_aggregate_backward(grad[:1], logits, lse, memory, noise),
        lambda: ops.gaussian_aggregate_backward(grad.float(), logits, lse, memory, noise),
        lambda: ops.gaussian_aggregate_backward(grad, logits, lse.float(), memory, noise),
        lambda: ops.gaussian_aggregate_backward(grad, logits, lse[:, 1:], memory, noise),
    ]:
        try:
            bad()
        except RuntimeError:
            continue
        raise AssertionError("a bad argument was taken")


if __name__ == "__main__":
    main(sys.argv[1])

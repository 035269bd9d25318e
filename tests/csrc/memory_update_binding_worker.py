"""Calls torch.ops.mcibi_fast_cuda of the library named on the command line, which takes CPU
tensors, and compares with the reference."""

from __future__ import annotations

import sys

import torch
from counted_labels import assert_counted_for_python  # this script's folder is on the path
from in_place import load_in_place

from mcibi_fast._schemas import OPS_WITH_LABELS
from mcibi_fast.ops import kept_rows
from mcibi_fast.ops.compiled import cuda_kernel
from mcibi_fast.ops.memory_update import reference

LABEL_OPS = OPS_WITH_LABELS["cuda"]


def main(library: str) -> None:
    load_in_place(library, "_cuda.so")
    ops = torch.ops.mcibi_fast_cuda
    generator = torch.Generator().manual_seed(0)
    K, Z, ignore, align_corners = 5, 12, 255, True
    features = torch.randn(2, Z, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K + 1, (2, 20, 23), generator=generator)  # K is a bad label
    labels[:, 0] = ignore
    memory = torch.randn(K, 2, generator=generator)
    flag = torch.zeros(3, dtype=torch.int64)

    sums, counts = ops.class_feature_sums(features, labels, K, ignore, align_corners, flag)
    known = labels.where(labels < K, -1)
    exact, exact_counts = reference.class_feature_sums(features, known, K, align_corners)
    torch.testing.assert_close(sums, exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(counts, exact_counts)
    assert flag.tolist() == [int((labels == K).sum()), K, LABEL_OPS.index("class_feature_sums")]

    grad_sums = torch.randn(K, Z, generator=generator, dtype=torch.float64)
    grad = ops.class_feature_sums_backward(
        grad_sums.T.contiguous().T, labels, 6, 7, ignore, align_corners, torch.float64, flag
    )
    assert grad.shape == features.shape
    torch.testing.assert_close((grad * features).sum(), (exact * grad_sums).sum())

    flag.zero_()
    kept = torch.zeros(1, dtype=torch.int64)
    options = (0.25, False, ignore, align_corners)
    found = ops.memory_update(memory, features, labels, *options, flag, kept)
    expected = reference.moving_average(memory, exact, exact_counts, 0.25, False)
    torch.testing.assert_close(found, expected)
    assert flag.tolist() == [int((labels == K).sum()), K, LABEL_OPS.index("memory_update")]
    assert kept.tolist() == [0]
    overflown = features.masked_fill(features == features.amax(), torch.inf)
    found = ops.memory_update(memory, overflown, labels, *options, flag, kept)
    assert found.isfinite().all() and kept.tolist() == [int((found == memory).all(1).sum())] != [0]
    cuda_kernel("memory_update").run(memory, overflown, labels.where(labels < K, ignore), *options)
    assert kept_rows() == kept
    flag.zero_()

    wrong = int((labels == K).sum())
    options = (ignore, align_corners)
    for op, args in {
        "class_feature_sums": (features, labels, K, *options),
        "class_feature_sums_backward": (grad_sums, labels, 6, 7, *options, torch.float64),
        "memory_update": (memory, features, labels, 0.25, False, *options),
    }.items():
        assert_counted_for_python(op, args, wrong, K)

    for bad in [
        lambda: ops.class_feature_sums(features[0], labels, K, ignore, False, flag),
        lambda: ops.class_feature_sums(features, labels[:1], K, ignore, False, flag),
        lambda: ops.class_feature_sums(features, labels, 5000, ignore, False, flag),
        lambda: ops.class_feature_sums(features, labels.float(), K, ignore, False, flag),
        lambda: ops.class_feature_sums(features, labels, K, ignore, False, flag[:2]),
        lambda: ops.memory_update(
            memory.T, features, labels, 0.1, False, ignore, False, flag, kept
        ),
        lambda: ops.memory_update(memory, features, labels, 0.1, False, ignore, False, flag, flag),
    ]:
        try:
            bad()
        except RuntimeError:
            continue
        raise AssertionError("a bad argument was taken")


if __name__ == "__main__":
    main(sys.argv[1])

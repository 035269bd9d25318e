"""Calls torch.ops.mcibi_fast_cuda of the library named on the command line, which takes CPU
tensors, and compares with PyTorch."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from counted_labels import assert_counted_for_python  # this script's folder is on the path
from in_place import load_in_place

from mcibi_fast._schemas import OPS_WITH_LABELS

LABEL_OPS = OPS_WITH_LABELS["cuda"]


def main(library: str) -> None:
    load_in_place(library, "_cuda.so")
    ops = torch.ops.mcibi_fast_cuda
    generator = torch.Generator().manual_seed(0)
    K, ignore, align_corners = 5, 255, True
    logits = torch.randn(2, K, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K + 1, (2, 20, 23), generator=generator)  # K is a bad label
    labels[:, 0] = ignore
    flag = torch.zeros(3, dtype=torch.int64)

    right = F.interpolate(logits, (20, 23), mode="bilinear", align_corners=align_corners).argmax(1)
    prediction = ops.upsample_argmax(logits, 20, 23, align_corners)
    assert torch.equal(prediction, right)
    confusion = ops.upsample_confusion(logits, labels, ignore, align_corners, flag)
    known = labels < K
    pairs = labels[known] * K + right[known]
    assert torch.equal(confusion, torch.bincount(pairs, minlength=K * K).view(K, K))
    assert flag.tolist() == [int((labels == K).sum()), K, LABEL_OPS.index("upsample_confusion")]

    args = (logits, labels, ignore, align_corners)
    assert_counted_for_python("upsample_confusion", args, int((labels == K).sum()), K)

    for wrong in [
        lambda: ops.upsample_argmax(logits[0], 20, 23, False),
        lambda: ops.upsample_argmax(logits, 0, 23, False),
        lambda: ops.upsample_argmax(logits.int(), 20, 23, False),
        lambda: ops.upsample_confusion(logits, labels[:1], ignore, False, flag),
        lambda: ops.upsample_confusion(logits, labels.float(), ignore, False, flag),
        lambda: ops.upsample_confusion(logits, labels, ignore, False, flag[:2]),
    ]:
        try:
            wrong()
        except RuntimeError:
            continue
        raise AssertionError("a wrong argument was taken")


if __name__ == "__main__":
    main(sys.argv[1])

"""Errors of whole models against the authors' package: the table in docs/checkpoints.md.

``python -m tests.compat.zoo_errors [PART OF A NAME]`` prints one line per checkpoint. Weights,
statistics and memory are random; all is in float64.
"""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import nn

from mcibi_fast.compat import sssegmentation
from mcibi_fast.compat.zoo import Published
from tests.compat import zoo_models as zoo


def whole_error(entry: Published, generator: torch.Generator) -> float:
    """The largest difference of logits, relative to the largest logit.

    The checkpoint is loaded with nothing but the dataset's name, and nothing may be assumed.
    """
    with pytest.MonkeyPatch.context() as patch:
        for initial in ("kaiming_uniform_", "uniform_", "trunc_normal_", "xavier_uniform_"):
            patch.setattr(nn.init, initial, lambda tensor, *_, **__: tensor)  # scrambled anyway
        released = zoo.scramble(zoo.released(entry, small=False), generator).double()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = sssegmentation.load({"model": released.state_dict()}, dataset=entry.dataset)
    images = torch.randn(1, 3, 49, 75, generator=generator, dtype=torch.float64)
    expected = zoo.logits(released, images)
    with torch.no_grad():
        logits = loaded.double()(images).logits
    assert logits.shape == expected.shape
    return float((logits - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    for name, entry in zoo.PUBLISHED.items():
        if not sys.argv[1:] or sys.argv[1] in name:
            error = whole_error(entry, torch.Generator().manual_seed(0))
            print(f"{name} {error:.1e}", flush=True)

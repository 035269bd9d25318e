"""Errors of the paper's other methods against the authors' package: the table in docs/peers.md.

``python -m tests.compat.peer_errors [--published] [CASE ...]`` prints one line per method, in
float64: narrow models, as the tests have them, or those of the published widths (on ResNet-50).
The last number is the parameters of the package's decoder in the published widths.
"""

from __future__ import annotations

import sys

import pytest

from tests.compat import peers
from tests.compat.peer_cases import CASES, released_parameters, stand_ins

if __name__ == "__main__":
    arguments = sys.argv[1:]
    sizes = peers.PUBLISHED if "--published" in arguments else peers.NARROW
    for name in [name for name in arguments if name != "--published"] or CASES:
        with pytest.MonkeyPatch.context() as patch:
            stand_ins(patch)
            found = CASES[name](sizes, patch)
        errors = "  ".join(f"{kind} {error:.1e}" for kind, error in found._asdict().items())
        print(f"{name}: {errors}  parameters {released_parameters(name):,}", flush=True)

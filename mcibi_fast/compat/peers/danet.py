"""DANet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("pam_net.", "cam_net.")
RENAMING = [
    (r"^decoder\.conv\.position\.0\.", "pam_in_conv."),
    (r"^decoder\.conv\.position\.1\.(query|key|value)\.", r"pam_net.\1_project."),
    (r"^decoder\.conv\.position\.1\.gamma$", "pam_net.gamma.scale"),
    (r"^decoder\.conv\.position\.2\.", "pam_out_conv."),
    (r"^decoder\.conv\.channel\.0\.", "cam_in_conv."),
    (r"^decoder\.conv\.channel\.1\.gamma$", "cam_net.gamma.scale"),
    (r"^decoder\.conv\.channel\.2\.", "cam_out_conv."),
    (r"^decoder\.classifier\.", "decoder_pamcam.1."),
    (r"^position_decoder\.classifier\.", "decoder_pam.1."),
    (r"^channel_decoder\.classifier\.", "decoder_cam.1."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, and the width of the position attention."""
    width = shape(state, "pam_net.query_project.weight")[0]
    return _blocks.widths(state, "decoder_pamcam.1.weight") | {"context_channels": width}

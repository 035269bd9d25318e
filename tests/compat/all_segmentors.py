"""Small settings of every segmentor of the authors' package, for the tests of `accelerate`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.compat.zoo_models import PUBLISHED, settings

K, Z = 5, 8
MAPS = [16, 32, 64, 128]  # of a ResNet-50 with a quarter of four channels
SCALES = [1, 2, 3, 6]

_RESNET = {
    "type": "ResNet",
    "structure_type": "random",
    "pretrained": False,
    "depth": 50,
    "base_channels": 4,
    "stem_channels": 8,
    "outstride": 8,
}
_VIT = {
    "type": "VisionTransformer",
    "structure_type": "random",
    "pretrained": False,
    "img_size": (64, 64),
    "embed_dims": 16,
    "num_heads": 2,
    "num_layers": 4,
    "out_indices": (0, 1, 2, 3),
    "norm_cfg": {"type": "LayerNorm", "eps": 1e-6},
}

# Heads on the last map, and on several; all have `feats_channels` and `dropout` besides.
_LAST: dict[str, dict[str, Any]] = {
    "FCN": {"num_convs": 2},
    "DepthwiseSeparableFCN": {"num_convs": 2},
    "APCNet": {"pool_scales": SCALES},
    "CCNet": {"num_recurrence": 2},
    "DANet": {"transform_channels": 4},
    "Deeplabv3": {"dilations": [1, 6, 12, 18]},
    "DMNet": {"filter_sizes": (1, 3, 5, 7), "is_fusion": False},
    "DNLNet": {"use_scale": True, "mode": "embeddedgaussian", "reduction": 2, "temperature": 0.05},
    "EMANet": {"momentum": 0.1, "num_stages": 3, "num_bases": 4},
    "GCNet": {
        "ratio": 0.25,
        "pooling_type": "att",
        "fusion_types": ("channel_add",),
        "norm_cfg": {"type": "LayerNorm"},
    },
    "IDRNet": {
        "refine_idcontext_channels": 4,
        "refine_coarsecontext_channels": 4,
        "use_sa_on_coarsecontext_before": True,
        "use_sa_on_coarsecontext_after": True,
        "use_fpn_before": False,
        "use_fpn_after": False,
        "force_stage1_use_oripr": False,
        "clsrelation_momentum": 0.1,
        "dlclsreps_momentum": 0.1,
        "ignore_index": -100,
    },
    "ISANet": {"down_factor": (3, 2), "isa_channels": 4},
    "NonLocalNet": {"use_scale": True, "mode": "embeddedgaussian", "reduction": 2},
    "OCRNet": {"transform_channels": 4, "scale": 1},
    "PSANet": {
        "type": "bi-direction",
        "mask_size": (17, 17),
        "compact": False,
        "shrink_factor": 2,
        "normalization_factor": 1.0,
        "psa_softmax": True,
    },
    "PSPNet": {"pool_scales": SCALES},
}
_SEVERAL: dict[str, dict[str, Any]] = {
    "ANNNet": {
        "in_channels_list": MAPS[2:],
        "transform_channels": 4,
        "query_scales": (1,),
        "key_pool_scales": (1, 3, 6, 8),
    },
    "CE2P": {
        "in_channels_list": MAPS,
        "pool_scales": SCALES,
        "epm_hidden_channels": 4,
        "shortcut_feats_channels": 4,
        "epm_out_channels": 2,
        "dropout_stage1": 0,
        "dropout_stage2": 0,
    },
    "Deeplabv3Plus": {
        "in_channels": [MAPS[0], MAPS[3]],
        "shortcut_channels": 4,
        "dilations": [1, 6, 12, 18],
    },
    "ENCNet": {
        "in_channels_list": MAPS[1:],
        "num_codes": 4,
        "extra": {"use_se_loss": True, "add_lateral": False},
    },
    "LRASPPNet": {"in_channels_list": MAPS[1:], "branch_channels_list": [4, 6]},
    "Segformer": {"in_channels_list": MAPS},
    "SemanticFPN": {
        "in_channels_list": MAPS,
        "upsample_cfg": {"mode": "nearest"},
        "feature_stride_list": [4, 8, 8, 8],
        "scale_head_channels": 4,
    },
    "UPerNet": {"in_channels_list": MAPS, "pool_scales": SCALES},
    "ICNet": {
        "encoder": {
            "layer_channels_list": (MAPS[1], MAPS[3]),
            "light_branch_middle_channels": 4,
            "psp_out_channels": Z,
            "out_channels_list": (4, 6, 6),
        },
        "in_channels_list": (4, 6, 6),
    },
    "FastFCN": {
        "in_channels": 4 * Z,
        "num_convs": 2,
        "jpu": {"in_channels_list": tuple(MAPS[1:]), "mid_channels": Z, "dilations": (1, 2, 4, 8)},
    },
    "SETRUP": {
        "in_channels_list": [16] * 4,
        "num_convs": 2,
        "scale_factor": 2,
        "kernel_size": 3,
        "norm_cfg": {"type": "LayerNorm", "eps": 1e-6},
    },
    "SETRMLA": {
        "in_channels_list": [16] * 4,
        "mla_feats_channels": 6,
        "mla_up_channels": 2,
        "scale_factor": 4,
        "norm_cfg": {"type": "LayerNorm", "eps": 1e-6},
    },
    "PointRend": {
        "fpn_in_channels_list": MAPS,
        "pointrend_in_channels_list": [8],
        "upsample_cfg": {"mode": "nearest"},
        "feature_stride_list": [4, 8, 8, 8],
        "scale_head_channels": 8,
        "num_fcs": 2,
        "coarse_pred_each_layer": True,
        "test": {"subdivision_steps": 2, "subdivision_num_points": 50, "scale_factor": 2},
    },
}


def small_settings(kind: str) -> dict[str, Any]:
    """Settings of a segmentor by the name of its class; KeyError if there are none here."""
    if kind in ("MCIBIPlusPlus", "MCIBI", "ISNet"):
        name = {
            "MCIBIPlusPlus": "mcibiplusplus_upernet_resnet50os8_voc",
            "MCIBI": "mcibi_deeplabv3_r50_lip",
            "ISNet": "isnet_resnet50os8_lip",
        }[kind]
        return settings(PUBLISHED[name], small=True)
    auxiliary: Any = {"in_channels": MAPS[2], "out_channels": Z, "dropout": 0}
    config: dict[str, Any] = {
        "type": kind,
        "num_classes": K,
        "align_corners": False,
        "norm_cfg": {"type": "BatchNorm2d"},
        "act_cfg": {"type": "ReLU", "inplace": True},
        "backbone": _RESNET,
        "auxiliary": auxiliary,
    }
    head = {"feats_channels": Z, "dropout": 0}
    if kind in _LAST:
        head |= {"in_channels": MAPS[3]} | _LAST[kind]
    else:
        head |= _SEVERAL[kind]
    if kind in ("LRASPPNet", "ENCNet", "FastFCN"):
        config["backbone"] = _RESNET | {"out_indices": (1, 2, 3)}
        config["backbone"]["selected_indices"] = (0, 1, 2)
    if kind == "FastFCN":
        config["segmentor"] = "FCN"
    if kind == "ICNet":
        config["backbone"] = _RESNET | {"selected_indices": (0, 1, 2)}
        config["auxiliary"] = None
    if kind.startswith("SETR"):
        config |= {"backbone": _VIT, "auxiliary": []}
    if kind == "ANNNet":
        config["backbone"] = _RESNET | {"out_indices": (2, 3), "selected_indices": (0, 1)}
    if kind == "PointRend":
        config["norm_cfg"] = {"type": "SyncBatchNorm"}  # of maps and of points
        config["auxiliary"] = {"in_channels": 8, "dropout": 0, "num_convs": 0}
    return config | {"head": head}


# Operators of mmcv, which is not needed: stand-ins of the same shapes.


class CrissCrossAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class PSAMask(nn.Module):
    def __init__(self, kind: str, mask_size: tuple[int, int]) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[2] * x.shape[3]]


def sample_points(features: Tensor, points: Tensor, align_corners: bool = False) -> Tensor:
    grid = 2 * points[:, :, None] - 1
    return F.grid_sample(features, grid, align_corners=align_corners).squeeze(3)


OF_MMCV = {
    "CCNet": ("ccnet.ccnet.CrissCrossAttention", CrissCrossAttention),
    "PSANet": ("psanet.psanet.PSAMask", PSAMask),
    "PointRend": ("pointrend.pointrend.PointSample", sample_points),
}

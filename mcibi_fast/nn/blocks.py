"""The convolution block that every head is built from, and its batch norm across ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Convolution without bias, batch norm and ReLU; the padding keeps the size at stride 1."""
    padding = dilation * (kernel_size // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """The model with SyncBatchNorm where that works: in a distributed run, on CUDA.

    Elsewhere the model is returned as it is (SyncBatchNorm raises on a CPU tensor). Call it once
    the model is on its device, before wrapping it in DistributedDataParallel.
    """
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if distributed and all(p.is_cuda for p in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model

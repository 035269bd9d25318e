"""Stand-ins for the authors' released package: its names, and what its classes do."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

K, Z, T = 6, 16, 8
MOMENTUM = {"base_momentum": 0.1, "base_lr": None, "adjust_by_learning_rate": False}


def cbr(in_channels, out_channels, kernel=1, stride=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class SelfAttentionBlock(nn.Module):
    def __init__(self, channels=Z, width=T, out_project=True, downsample=None, matmul_norm=True):
        super().__init__()
        self.key_project = nn.Sequential(cbr(channels, width), cbr(width, width))
        self.query_project = nn.Sequential(cbr(channels, width), cbr(width, width))
        self.value_project = cbr(channels, width if out_project else channels)
        self.out_project = cbr(width, channels) if out_project else None
        self.query_downsample = None
        self.key_downsample = downsample
        self.matmul_norm = matmul_norm
        self.transform_channels = width

    def forward(self, query_feats, key_feats):
        query = self.query_project(query_feats)
        key, value = self.key_project(key_feats), self.value_project(key_feats)
        if self.query_downsample is not None:
            query = self.query_downsample(query)
        if self.key_downsample is not None:
            key, value = self.key_downsample(key), self.key_downsample(value)
        scores = torch.einsum("bcn,bcm->bnm", query.flatten(2), key.flatten(2))
        if self.matmul_norm:
            scores = scores / self.transform_channels**0.5
        context = torch.einsum("bnm,bcm->bcn", scores.softmax(-1), value.flatten(2))
        context = context.unflatten(2, query_feats.shape[2:])
        return context if self.out_project is None else self.out_project(context)


class FeaturesMemoryV2(nn.Module):
    def __init__(self, out_channels=Z, hard=False, downsample=False, num_classes=K):
        super().__init__()
        self.align_corners = False
        self.num_classes = num_classes
        self.feats_channels = Z
        self.use_hard_aggregate = hard
        if downsample:
            self.downsample_before_sa = cbr(Z, Z, 3, 2)
        start = torch.tensor([[0.0, 1.0]] * num_classes)
        self.memory = nn.Parameter(start, requires_grad=False)
        self.self_attention = SelfAttentionBlock()
        self.bottleneck = cbr(2 * Z, out_channels, 3)

    def forward(self, feats, preds=None):
        weights = preds.softmax(1)
        if self.use_hard_aggregate:
            weights = F.one_hot(weights.argmax(1), self.num_classes).movedim(3, 1).to(preds.dtype)
        table = []
        for k, (mean, std) in enumerate(self.memory.data):
            torch.manual_seed(k)
            row = torch.full((1, self.feats_channels), float(mean))
            table.append(torch.normal(row, torch.full_like(row, float(std))))
        table = torch.cat(table).type_as(weights)
        context = torch.einsum("bkhw,kc->bchw", weights, table)
        if hasattr(self, "downsample_before_sa"):
            query, keys = self.downsample_before_sa(feats), self.downsample_before_sa(context)
            context = F.interpolate(
                self.self_attention(query, keys), feats.shape[2:], mode="bilinear"
            )
        else:
            context = self.self_attention(feats, context)
        return table, self.bottleneck(torch.cat([feats, context], dim=1))

    def update(
        self, features, segmentation, ignore_index=-100, momentum_cfg=None, learning_rate=None
    ):
        momentum = momentum_cfg["base_momentum"]
        if momentum_cfg["adjust_by_learning_rate"]:
            momentum = momentum / momentum_cfg["base_lr"] * learning_rate
        memory = self.memory.data.clone()
        pixels, labels = features.movedim(1, 3).flatten(0, 2), segmentation.long().flatten()
        for k in labels.unique().tolist():
            if k != ignore_index:
                mean = pixels[labels == k].mean(0)
                seen = torch.stack([mean.mean(), mean.std()])
                memory[k] = (1 - momentum) * memory[k] + momentum * seen
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(memory.div_(dist.get_world_size()))
        self.memory = nn.Parameter(memory, requires_grad=False)


class MCIBIPlusPlus(nn.Module):
    """FCN: the part around the memory."""

    def __init__(self, **options):
        super().__init__()
        self.mode = "TRAIN"
        self.backbone_net = cbr(3, 12, 3, 4)
        self.bottleneck = cbr(12, Z, 3)
        self.decoder_pr = nn.Sequential(cbr(Z, Z), nn.Dropout2d(0.1), nn.Conv2d(Z, K, 1))
        self.memory_module = FeaturesMemoryV2(**options)
        self.decoder_cls = nn.Sequential(cbr(Z, Z), nn.Dropout2d(0.1), nn.Conv2d(Z, K, 1))

    def forward(self, data_meta, **kwargs):
        size = tuple(data_meta.images.shape[2:])
        pixel_representations = self.bottleneck(self.backbone_net(data_meta.images))
        preds_pr = self.decoder_pr(pixel_representations)
        assert pixel_representations.shape[2:] == preds_pr.shape[2:]
        _, output = self.memory_module(pixel_representations, preds_pr)
        preds_cls = self.decoder_cls(output)
        if self.mode != "TRAIN":
            return SimpleNamespace(seg_logits=preds_cls)
        labels = data_meta.getannotations()["seg_targets"]
        with torch.no_grad():
            self.memory_module.update(
                features=F.interpolate(
                    pixel_representations, size=size, mode="bilinear", align_corners=False
                ),
                segmentation=labels,
                learning_rate=kwargs["learning_rate"],
                ignore_index=255,
                momentum_cfg=MOMENTUM,
            )
        full = [F.interpolate(p, size=size, mode="bilinear") for p in (preds_pr, preds_cls)]
        losses = [F.cross_entropy(p, labels.long(), ignore_index=255) for p in full]
        return SimpleNamespace(loss=0.4 * losses[0] + losses[1])

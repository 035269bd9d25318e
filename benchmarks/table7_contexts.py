"""Table 7: ``python -m benchmarks.table7_contexts [--size 32]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.counting import Counts, count
from mcibi_fast.nn import (
    ANN,
    ASPP,
    DNL,
    PPM,
    APCNet,
    CCNet,
    DANet,
    DatasetLevelContext,
    GaussianMemory,
    PositionConfidenceAttention,
    conv_bn_relu,
)

CHANNELS, Z, K = 2048, 512, 150  # of the map, of the pixel representations, classes of ADE20K


class DCA(nn.Module):
    """The paper's row: Conv3x3 to R, dataset-level context in the released form, fusing Conv3x3.

    The logits of W are given: Table 7 leaves the classifiers out.
    """

    def __init__(self, memory: GaussianMemory) -> None:
        super().__init__()
        self.bottleneck = conv_bn_relu(CHANNELS, Z, 3)
        self.context = DatasetLevelContext(memory)
        self.context.weight_head = nn.Identity()

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        return self.context.augment(self.bottleneck(features), logits)


class ASPPWithDCA(nn.Module):
    """The paper's row ASPP+DCA, whose bottlenecks are 1x1 and which has a second attention.

    Its query is the context within the image, its key the augmented representations.
    """

    def __init__(self, memory: GaussianMemory) -> None:
        super().__init__()
        self.within_image = ASPP(CHANNELS, Z)
        self.bottleneck = conv_bn_relu(CHANNELS, Z, 1)
        self.memory = memory
        self.attention = PositionConfidenceAttention(Z)
        self.fuse = conv_bn_relu(2 * Z, Z, 1)
        self.attention_within = PositionConfidenceAttention(Z)
        self.fuse_within = conv_bn_relu(2 * Z, Z, 1)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        within, R = self.within_image(features), self.bottleneck(features)
        context = self.attention(R, self.memory.aggregate(logits))
        augmented = self.fuse(torch.cat([R, context], dim=1))
        both = [self.attention_within(within, augmented), within]
        return self.fuse_within(torch.cat(both, dim=1))


class ReleasedASPPHead(nn.Module):
    """What the released checkpoints with ASPP have: 3x3 bottlenecks; without the extra attention."""

    def __init__(self, memory: GaussianMemory) -> None:
        super().__init__()
        self.within_image = ASPP(CHANNELS, Z)
        self.dca = DCA(memory)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        return torch.cat([self.dca(features, logits), self.within_image(features)], dim=1)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: as printed.
        make: builds the module.
        second_input: channels of what it takes beside the last map: the map before (ANN), logits.
        repeated: parts that the published code runs twice and this one once.
        paper: parameters in M and FLOPs in G as printed; None for rows that the paper has not.
    """

    name: str
    make: Callable[[], nn.Module]
    second_input: int | None = None
    repeated: Callable[[nn.Module], Sequence[nn.Module]] = lambda module: ()
    paper: tuple[float, float] | None = None

    def inputs(self, size: int, device: str) -> tuple[Tensor, ...]:
        channels = [CHANNELS] if self.second_input is None else [CHANNELS, self.second_input]
        generator = torch.Generator().manual_seed(size)
        return tuple(
            torch.empty(1, c, size, size, device=device)
            if device == "meta"
            else torch.randn(1, c, size, size, generator=generator).relu().to(device)
            for c in channels
        )

    def counts(self, size: int = 128) -> Counts:
        """Counts at (1, 2048, size, size), without memory."""
        with torch.device("meta"):
            module = self.make()
        module = module.to("meta").eval()
        return count(module, *self.inputs(size, "meta"), repeated=self.repeated(module))


def gaussian() -> GaussianMemory:
    return GaussianMemory(K, Z)


ROWS = [
    Row("ASPP", lambda: ASPP(CHANNELS, Z), paper=(42.21, 674.47)),
    Row("PPM", lambda: PPM(CHANNELS, Z), paper=(23.07, 309.45)),
    Row("CCNet", lambda: CCNet(CHANNELS, Z), paper=(23.92, 397.38)),
    Row("DANet", lambda: DANet(CHANNELS, Z), paper=(23.92, 392.02)),
    Row(
        "ANN",
        lambda: ANN(CHANNELS // 2, CHANNELS, Z),
        second_input=CHANNELS // 2,
        repeated=lambda module: [module.context.query],  # as query and as key, with one weight
        paper=(20.32, 335.24),
    ),
    Row("DNL", lambda: DNL(CHANNELS, Z), paper=(24.12, 395.25)),
    Row("APCNet", lambda: APCNet(CHANNELS, Z), paper=(30.46, 413.12)),
    Row("DCA, MCIBI++", lambda: DCA(gaussian()), second_input=K, paper=(14.82, 242.80)),
    Row(
        "ASPP+DCA, MCIBI++", lambda: ASPPWithDCA(gaussian()), second_input=K, paper=(45.63, 730.56)
    ),
    Row("ASPP+DCA, released", lambda: ReleasedASPPHead(gaussian()), second_input=K),
]
if __name__ == "__main__":
    for r in ROWS:
        c = r.counts()
        print(r.name, c.parameters / 1e6, c.printed / 1e9, c.true / 1e9)

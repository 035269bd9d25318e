"""Folding: what can be computed in advance once a model is trained.

These are batch norms and what a context makes of the class representations C_dl.

Everything is folded in float64 and rounded once.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mcibi_fast.nn.attention import (
    SeveralAttentions,
    attend_pixels,
    class_query,
    explain_classes,
    explain_pixels,
    mix_classes,
    mix_rows,
)
from mcibi_fast.nn.blocks import ConvBNReLU
from mcibi_fast.nn.context import (
    Concatenation,
    ContextBase,
    DatasetLevelContext,
    check_size,
    resize,
)
from mcibi_fast.nn.swapping import original
from mcibi_fast.ops.checks import wide

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_NORM_AND_ACTIVATION = "timm.layers.norm_act.BatchNormAct2d"  # by name, as timm may be missing


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> None:
    """Folds each batch norm into the convolution before it, in place; evaluation mode only.

    The pairs are found next to each other in an ``nn.Sequential`` and in a symbolic trace of
    ``forward``. Where the control flow depends on the input, which cannot be traced, the parts are
    traced one by one; batch norms that a part shares with no convolution stay. timm's batch norms
    with an activation are folded, too, as are its convolutions with padding as in TensorFlow.
    """
    pairs = {**dict(_pairs_in_sequence(model)), **dict(_traced_pairs(model))}
    for conv_name, norm_name in pairs.items():
        conv: Any = model.get_submodule(conv_name)
        norm: Any = model.get_submodule(norm_name)
        if _foldable(conv, norm):
            folded = fuse_conv_bn_eval(copy.deepcopy(conv).double(), copy.deepcopy(norm).double())
            _replace(model, conv_name, folded.to(conv.weight))
            _replace(model, norm_name, _after_norm(norm))


def _pairs_in_sequence(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            names = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
            yield from itertools.pairwise(names)


def _traced_pairs(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Pairs of modules, each called once, where only the second reads what the first returns."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # a model may do anything with values, which a trace does not have
        for name, child in model.named_children():
            yield from _traced_pairs(child, f"{prefix}{name}.")
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        first = node.args[0] if node.op == "call_module" and node.args else None
        if (
            isinstance(first, fx.Node)
            and first.op == "call_module"
            and len(first.users) == 1
            and calls[first.target] == calls[node.target] == 1
        ):
            yield f"{prefix}{first.target}", f"{prefix}{node.target}"


class _Tracer(fx.Tracer):
    """Traces only modules that hold batch norms, so that less can fail to be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(isinstance(child, _NORMS) for child in m.modules()) or isinstance(m, _NORMS)


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether both are of classes that compute what their weights say, and nothing else."""
    cls = original(conv)
    plain = cls is nn.Conv2d or _name(cls) == "timm.layers.conv2d_same.Conv2dSame"
    known = type(norm) in _NORMS or _name(type(norm)) == _NORM_AND_ACTIVATION
    return plain and known and getattr(norm, "running_mean", None) is not None


def _after_norm(norm: Any) -> nn.Module:
    """What is left of a batch norm that is folded: the activation, if timm's class has one."""
    if _name(type(norm)) == _NORM_AND_ACTIVATION:
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.eval())


@torch.no_grad()
def fold_context(context: DatasetLevelContext) -> FoldedContext:
    """The context for inference; it takes over the modules of ``context``.

    Args:
        context: a context in evaluation mode whose batch norms are folded.

    Raises:
        ValueError: the memory has several representations per class.
    """
    if isinstance(context.attention, SeveralAttentions):
        raise ValueError(
            "fold: needs one representation per class; with several, use the model as it is"
        )
    if context.form()[0] == "class-rank":
        return _fold_linear(context).eval()
    if context.hard and context.downsample is None:
        return _fold_hard(context).eval()
    return FoldedPixelContext(context).eval()


class FoldedContext(ContextBase):
    """A :class:`DatasetLevelContext` whose class representations C_dl are folded into tables.

    At evaluation the noise is fixed, and therefore so is C_dl. A folded context has no memory and
    cannot be trained.
    """

    def __init__(self, context: DatasetLevelContext) -> None:
        super().__init__()
        self.weight_head = context.weight_head
        self.fuse = context.fuse
        self.hard = context.hard
        self.scale = context.attention.scale
        self.form_and_reason = context.form()

    def form(self) -> tuple[str, str]:
        return self.form_and_reason


class FoldedClassContext(FoldedContext):
    """Attention on the weights W: keys and values are tables of K rows.

    Args:
        context: the context that is folded.
        scores: computes Q keys^T (B, K, h, w) from R.
        values: computes from P W (B, K, h, w) what the fusion F_T takes as C_bi.
    """

    def __init__(self, context: DatasetLevelContext, scores: nn.Module, values: nn.Module) -> None:
        super().__init__(context)
        self.scores = scores
        self.values = values

    def project(self, features: Tensor) -> Tensor:
        return self.scores(features)

    def attend(self, query: Tensor, weight_logits: Tensor, size: torch.Size) -> Tensor:
        check_size(weight_logits, size)
        return self.values(mix_classes(query, weight_logits, self.scale, self.hard))

    def _explain_attention(self, query: Tensor, weight_logits: Tensor) -> str:
        return explain_classes(query, weight_logits, self.scale, self.hard)


def _fold_linear(context: DatasetLevelContext) -> FoldedClassContext:
    """Folds linear projections: the scores are one convolution of R, C_bi is one of P W.

    If F_T concatenates, the half of its convolution that reads the context folds too. With the
    table V = F_O(F_C(C_dl)), conv(P W V) is a convolution of the K channels of P W with
    weight[o, k] = sum_c w[o, c] V[k, c], which is exact at the zero-padded border as well.
    ``attend`` then returns P W, and so are the contexts of past frames that F_T takes for videos.
    With more classes than channels this would cost more and is not done.
    """
    attention = copy.deepcopy(context.attention).double()
    keys, values = attention.class_tables(context.memory.representations().double())
    like = context.attention
    folded = FoldedClassContext(
        context,
        _convolution(*class_query(attention, keys), like=like),
        _convolution(values, None, like=like),
    )
    channels, num_classes = values.shape[:2]
    if isinstance(context.fuse, Concatenation) and num_classes <= channels:
        conv: Any = context.fuse.conv[0]
        of_R, *of_past, of_C_bi = conv.weight.double().split(channels, dim=1)
        if context.fuse.past == "context":
            of_past = [_on_classes(weight, values) for weight in of_past]
        folded.values = nn.Identity()
        folded.fuse = ActivatedSum(
            _convolution(torch.cat([of_R, *of_past], dim=1), conv.bias, like=conv),
            _convolution(_on_classes(of_C_bi, values), None, like=conv),
            context.fuse.conv[2],
        )
    return folded


def _on_classes(weight: Tensor, values: Tensor) -> Tensor:
    """Turns a convolution of C_bi into one of P W: (o, c, y, x), (c, K, 1, 1) -> (o, K, y, x)."""
    return torch.einsum("ocyx,ck->okyx", weight, values.flatten(1))


def _fold_hard(context: DatasetLevelContext) -> FoldedClassContext:
    """Folds one-hot weights and ReLU projections: a pixel's key and value are its class's.

    So keys and values are tables of K rows, whatever computes them. This does not hold in training,
    where batch norm makes them depend on how many pixels each class has.
    """
    attention: Any = copy.deepcopy(context.attention).double()
    C_dl = context.memory.representations().double().T[None, :, :, None]  # (1, channels, K, 1)
    keys, values = attention.key(C_dl)[0, ..., 0], attention.value(C_dl)[0, ..., 0]  # (T, K)
    output, *rest = attention.output
    on_classes = output.weight.flatten(1) @ values  # (channels, K)
    like = context.attention
    folded = FoldedClassContext(
        context,
        nn.Sequential(like.query, _convolution(keys.T[..., None, None], None, like=like)),
        nn.Sequential(_convolution(on_classes[..., None, None], output.bias, like=like), *rest),
    )
    num_classes = context.memory.num_classes
    folded.form_and_reason = "class-rank", f"each key is one of K={num_classes} classes"
    return folded


class FoldedPixelContext(FoldedContext):
    """General attention: the tables are C_dl after the first convolution of the keys and values.

    Each row of W sums to one, so up to the first ReLU this convolution of W C_dl is W times the
    convolution of the K rows of C_dl. If a stride-2 convolution comes before it, the table is C_dl.
    """

    tables: Tensor

    def __init__(self, context: DatasetLevelContext) -> None:
        super().__init__(context)
        attention, C_dl = context.attention, context.memory.representations()
        self.query, self.output = attention.query, attention.output
        self.key, self.value = attention.key, attention.value
        self.downsample = context.downsample
        self.align_corners = context.align_corners
        if self.downsample is None:
            key_table, self.key = _after_first_convolution(attention.key, C_dl)
            value_table, self.value = _after_first_convolution(attention.value, C_dl)
            C_dl = torch.cat([key_table, value_table], dim=1)
        self.register_buffer("tables", C_dl.to(next(attention.parameters()).dtype))

    def project(self, features: Tensor) -> Tensor:
        return self.query(features if self.downsample is None else self.downsample(features))

    def attend(self, query: Tensor, weight_logits: Tensor, size: torch.Size) -> Tensor:
        check_size(weight_logits, size)
        context = attend_pixels(query, *self._keys_and_values(weight_logits), self.scale)
        return resize(self.output(context), size, self.align_corners)

    def _keys_and_values(self, weight_logits: Tensor) -> tuple[Tensor, Tensor]:
        mixed = mix_rows(weight_logits, self.tables.to(wide(self.tables.dtype)), hard=self.hard)
        if self.downsample is None:
            keys, values = mixed.chunk(2, dim=1)
        else:
            keys = values = self.downsample(mixed)
        return self.key(keys), self.value(values)

    def _explain_attention(self, query: Tensor, weight_logits: Tensor) -> str:
        return explain_pixels(query, *self._keys_and_values(weight_logits), self.scale)


class ActivatedSum(nn.Module):
    """ReLU(conv([R, past frames' maps]) + values(P W)); ``prepare`` computes the first summand.

    A model with LeakyReLU has that instead.
    """

    def __init__(self, conv: nn.Conv2d, values: nn.Conv2d, activation: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.values = values
        self.activation = activation

    def prepare(self, features: Tensor, past: Sequence[Tensor] = ()) -> Tensor:
        return self.conv(torch.cat([features, *past], dim=1) if past else features)

    def forward(self, prepared: Tensor, context: Tensor) -> Tensor:
        return self.activation(prepared + self.values(context))


def _convolution(weight: Tensor, bias: Tensor | None, *, like: nn.Module) -> nn.Conv2d:
    """The convolution with this weight that keeps the map's size, in the dtype of ``like``."""
    out_channels, in_channels, size, _ = weight.shape
    # Built on the meta device, where initial weights draw no random numbers.
    conv = nn.Conv2d(
        in_channels, out_channels, size, padding=size // 2, bias=bias is not None, device="meta"
    )
    conv.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        conv.bias = nn.Parameter(bias)
    return conv.to(next(like.parameters()))


def _after_first_convolution(projection: nn.Module, C_dl: Tensor) -> tuple[Tensor, nn.Module]:
    """C_dl (K, channels) after the projection's first convolution (K, T), and the layers left."""
    first: Any = projection
    rest: list[nn.Module] = []
    if isinstance(projection, nn.Sequential) and not isinstance(projection, ConvBNReLU):
        first, *rest = projection
    if isinstance(first, ConvBNReLU):
        first, rest = first[0], [first[2], *rest]
    table = C_dl.double() @ first.weight.flatten(1).double().T + first.bias.double()
    return table, nn.Sequential(*rest)

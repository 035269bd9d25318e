"""Wrong arguments: one error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import mcibi_fast
from mcibi_fast import ops
from mcibi_fast.ops import finite
from mcibi_fast.ops import labels as label_checks

F = torch.zeros
MEMORY = F(4, 2)
FEATURES = F(2, 8, 3, 3)
LABELS = F(2, 6, 6, dtype=torch.int64)
LOGITS = F(2, 4, 3, 3)
EPS = F(4, 8)
QKV = (F(2, 5, 8),) * 3


def sums(features: Any = FEATURES, labels: Any = LABELS, num_classes: Any = 4) -> None:
    ops.class_feature_sums(features, labels, num_classes)


def update(memory: Any = MEMORY, features: Any = FEATURES, labels: Any = LABELS, **k: Any) -> None:
    ops.memory_update(memory, features, labels, **k)


def aggregate(
    logits: Any = LOGITS, memory: Any = MEMORY, channels: Any = 8, noise: Any = EPS
) -> None:
    ops.gaussian_aggregate(logits, memory, channels, noise=noise)


def attend(query: Any = QKV[0], key: Any = QKV[1], value: Any = QKV[2], **k: Any) -> None:
    ops.confidence_attention(query, key, value, **k)


def attend_classes(query: Any = QKV[0], weights: Any = QKV[1], scale: Any = 1.0, **k: Any) -> None:
    ops.class_rank_attention(query, weights, scale=scale, **k)


def upsampled_loss(logits: Any = LOGITS, labels: Any = LABELS, **k: Any) -> None:
    ops.upsample_cross_entropy(logits, labels, **k)


def upsampled_argmax(logits: Any = LOGITS, size: Any = (6, 6)) -> None:
    ops.upsample_argmax(logits, size)


def confusion(logits: Any = LOGITS, labels: Any = LABELS, num_classes: Any = 4) -> None:
    ops.upsample_confusion(logits, labels, num_classes)


WRONG: list[tuple[Callable[..., None], dict[str, Any], type[Exception], str]] = [
    (sums, {"features": [1.0]}, TypeError, "features: expected a tensor"),
    (sums, {"features": F(2, 8, 3)}, ValueError, "features: expected shape"),
    (sums, {"features": FEATURES.int()}, TypeError, "features: dtype"),
    (sums, {"labels": LABELS.float()}, TypeError, "labels: dtype"),
    (sums, {"labels": LABELS.bool()}, TypeError, "labels: dtype"),
    (sums, {"labels": LABELS[:1]}, ValueError, "labels: batch of 1"),
    (sums, {"labels": LABELS.to("meta")}, ValueError, "labels: is on meta"),
    (sums, {"features": F(2, 0, 3, 3)}, ValueError, "features: no dimension may be empty"),
    (sums, {"num_classes": 0}, ValueError, "num_classes: must be at least 1"),
    (sums, {"num_classes": 1.5}, TypeError, "num_classes: expected an integer"),
    (update, {"memory": F(4, 3)}, ValueError, "memory: expected shape"),
    (update, {"memory": MEMORY.half()}, TypeError, "memory: dtype"),
    (update, {"momentum": float("nan")}, ValueError, "momentum: must be between 0 and 1"),
    (update, {"momentum": 1.5}, ValueError, "momentum: must be between 0 and 1"),
    (update, {"features": F(2, 1, 3, 3), "unbiased": True}, ValueError, "unbiased: needs"),
    (aggregate, {"logits": F(2, 5, 3, 3)}, ValueError, "logits: 5 classes"),
    (aggregate, {"logits": LOGITS.long()}, TypeError, "logits: dtype"),
    (aggregate, {"channels": 0}, ValueError, "channels: must be at least 1"),
    (aggregate, {"noise": F(4, 7)}, ValueError, "noise: expected shape"),
    (aggregate, {"noise": EPS.half()}, TypeError, "noise: dtype"),
    (aggregate, {"noise": EPS.to("meta")}, ValueError, "noise: is on meta"),
    (attend, {"query": F(2, 5)}, ValueError, "query: expected shape"),
    (attend, {"key": F(2, 5, 7)}, ValueError, "key: expected"),
    (attend, {"value": F(2, 6, 8)}, ValueError, "value: expected"),
    (attend, {"value": F(2, 5, 8).double()}, TypeError, "query, key, value: one dtype"),
    (attend, {"scale": float("inf")}, ValueError, "scale: must be finite"),
    (attend_classes, {"query": F(2, 5)}, ValueError, "query: expected shape"),
    (attend_classes, {"query": F(2, 0, 8)}, ValueError, "query: no dimension may be empty"),
    (attend_classes, {"weights": QKV[0].long()}, TypeError, "weights: dtype"),
    (attend_classes, {"weights": F(2, 5, 7)}, ValueError, "weights: expected the query's shape"),
    (attend_classes, {"weights": F(2, 6, 8)}, ValueError, "weights: expected the query's shape"),
    (attend_classes, {"weights": QKV[0].double()}, TypeError, "query, weights: one dtype"),
    (attend_classes, {"weights": QKV[0].to("meta")}, ValueError, "weights: is on meta"),
    (attend_classes, {"scale": float("nan")}, ValueError, "scale: must be finite"),
    (upsampled_loss, {"logits": F(2, 4, 3)}, ValueError, "logits: expected shape"),
    (upsampled_loss, {"logits": LOGITS.int()}, TypeError, "logits: dtype"),
    (upsampled_loss, {"logits": F(2, 4, 0, 3)}, ValueError, "logits: no dimension may be empty"),
    (upsampled_loss, {"labels": LABELS.float()}, TypeError, "labels: dtype"),
    (upsampled_loss, {"labels": LABELS[:1]}, ValueError, "labels: batch of 1, but logits"),
    (upsampled_loss, {"labels": LABELS[:, :0]}, ValueError, "labels: no dimension may be empty"),
    (upsampled_loss, {"labels": LABELS.to("meta")}, ValueError, "labels: is on meta"),
    (upsampled_loss, {"weight": F(5)}, ValueError, "weight: expected one for each of the 4"),
    (upsampled_loss, {"weight": F(4, 1)}, ValueError, "weight: expected shape"),
    (upsampled_loss, {"weight": F(4).int()}, TypeError, "weight: dtype"),
    (upsampled_loss, {"weight": F(4).to("meta")}, ValueError, "weight: is on meta"),
    (upsampled_loss, {"label_smoothing": 1.5}, ValueError, "label_smoothing: must be between"),
    (upsampled_loss, {"label_smoothing": "0"}, TypeError, "label_smoothing: expected a number"),
    (upsampled_loss, {"reduction": "avg"}, ValueError, "reduction: 'avg' is none of none, sum"),
    (upsampled_argmax, {"logits": F(4, 3, 3)}, ValueError, "logits: expected shape"),
    (upsampled_argmax, {"size": 6}, TypeError, r"size: expected \(H, W\), got 6"),
    (upsampled_argmax, {"size": (6, 0)}, ValueError, "size: must be at least 1"),
    (upsampled_argmax, {"size": (6.0, 6)}, TypeError, "size: expected an integer"),
    (confusion, {"labels": LABELS[:1]}, ValueError, "labels: batch of 1"),
    (confusion, {"num_classes": 5}, ValueError, "num_classes: is 5, but the logits have 4"),
    (confusion, {"num_classes": 4.0}, TypeError, "num_classes: expected an integer"),
]


@pytest.mark.parametrize(("call", "wrong", "error", "message"), WRONG, ids=[w[3] for w in WRONG])
def test_wrong_argument_is_named(
    call: Callable[..., None], wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    call()
    with pytest.raises(error, match=f"^{message}"):
        call(**wrong)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [4, 100, -1])
@pytest.mark.parametrize("call", [sums, update, upsampled_loss, confusion])
@pytest.mark.thinned(together=2)
def test_bad_label_raises_on_the_cpu(
    backend: str, dtype: torch.dtype, bad: int, call: Callable[..., None]
) -> None:
    if bad < 0 and dtype == torch.uint8:
        bad = 254
    labels = LABELS.to(dtype, copy=True)
    labels[1, 2, 3] = bad
    with mcibi_fast.backend(backend), pytest.raises(ValueError, match="labels") as caught:
        call(labels=labels)
    assert f"labels: value {bad} at (b=1, y=2, x=3) is outside [0, 4)" in str(caught.value)
    assert str(caught.value).endswith("and is not ignore_index (255)")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ignored_labels_count_for_nothing(backend: str) -> None:
    with mcibi_fast.backend(backend):
        everything_ignored = torch.full_like(LABELS, 255)
        memory = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
        assert torch.equal(ops.memory_update(memory, FEATURES, everything_ignored), memory)
        # An ignore_index below num_classes takes that class out.
        sums, counts = ops.class_feature_sums(FEATURES + 1, LABELS, 4, ignore_index=0)
        assert not sums.any()
        assert not counts.any()
        assert ops.upsample_cross_entropy(LOGITS, LABELS, ignore_index=0) == 0
        assert not ops.upsample_confusion(LOGITS, everything_ignored, 4).any()


def test_unknown_backend_and_op_are_named() -> None:
    with pytest.raises(ValueError, match="'cudaa' is none of"), mcibi_fast.backend("cudaa"):
        pass
    with pytest.raises(ValueError, match="no op 'conv'; the ops are class_feature_sums"):
        mcibi_fast.explain("conv")


def test_forced_backend_that_cannot_run_says_why() -> None:
    with mcibi_fast.backend("cuda"):
        with pytest.raises(
            ops.BackendError, match=r"class_feature_sums: no backend can run .*cuda: "
        ):
            sums()
        attend()  # has no such backend, so keeps its own choice
    sums()  # the block has ended


def test_check_labels_raises_for_a_flag_and_clears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag of a device, which CUDA kernels set; here it is on the CPU and set by hand."""
    monkeypatch.setattr(label_checks, "_flags", {})
    flag = label_checks.flag(torch.device("cpu"))
    ops.check_labels()
    flag += torch.tensor([2, 9, 0])  # two bad labels, the first is 9, the op's number is 0
    message = r"class_feature_sums on cpu met 2 labels outside \[0, num_classes\) .* first is 9"
    with pytest.raises(ValueError, match=message):
        ops.check_labels()
    assert not flag.any()
    ops.check_labels()


@pytest.mark.parametrize(
    ("made", "counters"),
    [(label_checks.flag, (label_checks, "_flags")), (finite.counter, (finite, "_counters"))],
)
def test_a_counter_is_not_made_inside_a_cuda_graph(
    made: Callable[..., Any], counters: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each replay of the graph would set it to zero again."""
    monkeypatch.setattr(*counters, {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="on cuda:0 is inside the capture of a CUDA graph"):
        made(device)
    before = F(3, dtype=torch.int64)  # as a call before the capture has made it
    monkeypatch.setattr(*counters, {device: before})
    assert made(device) is before


@pytest.mark.parametrize(
    "momentum", [np.int64(5), np.float32(5), torch.tensor(5), torch.tensor(float("nan"))]
)
def test_momentum_is_checked_whatever_kind_of_number_it_is(momentum: Any) -> None:
    update(momentum=type(momentum)(0) if isinstance(momentum, np.generic) else torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"^momentum: must be between 0 and 1"):
        update(momentum=momentum)
    with pytest.raises(TypeError, match=r"^momentum: expected a number"):
        update(momentum="1")


def test_the_default_ignore_index_is_refused_where_it_is_a_class() -> None:
    labels = torch.full((1, 2, 2), 255)
    features, logits = torch.ones(1, 2, 2, 2), torch.zeros(1, 256, 2, 2)
    memory = torch.ones(256, 2)
    for call in (
        lambda **k: ops.class_feature_sums(features, labels, 256, **k)[0],
        lambda **k: ops.memory_update(memory, features, labels, **k) - memory,
        lambda **k: ops.upsample_cross_entropy(logits, labels, **k),
        lambda **k: ops.upsample_confusion(logits, labels, 256, **k),
    ):
        with pytest.raises(ValueError, match=r"^ignore_index: 255, the default, is the label of"):
            call()
        assert call(ignore_index=-1).any()  # class 255 counts
    ops.upsample_cross_entropy(logits[:, 1:], labels)  # of 255 classes 255 is none


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_mean_over_no_weight_is_pytorchs(backend: str, label_smoothing: float) -> None:
    weight, labels = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.zeros(2, 3, 3, dtype=torch.int64)
    options: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing}
    with mcibi_fast.backend(backend):
        loss = ops.upsample_cross_entropy(LOGITS, labels, **options)
    torch.testing.assert_close(loss, cross_entropy(LOGITS, labels, **options), equal_nan=True)
    assert not loss.isfinite()

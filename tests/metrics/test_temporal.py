"""TC and VC by both protocols, on cases worked out by hand and against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mcibi_fast.metrics import TemporalConsistency, VideoConsistency, VideoMetrics, warp_backward


def rows(*lines: str) -> torch.Tensor:
    return torch.tensor([[int(c) for c in line] for line in lines])


def still(height: int, width: int) -> torch.Tensor:
    return torch.zeros(2, height, width)


# --- the warp


def test_strict_warp_samples_where_the_flow_points() -> None:
    labels = rows("1234", "5678")
    assert warp_backward(labels, still(2, 4), "strict").tolist() == labels.tolist()
    right = still(2, 4)
    right[0] = 1  # every pixel goes to its right neighbour, the last column out of the picture
    assert warp_backward(labels, right, "strict").tolist() == [[2, 3, 4, 0], [6, 7, 8, 0]]
    up = still(2, 4)
    up[1] = -1
    assert warp_backward(labels, up, "strict").tolist() == [[0, 0, 0, 0], [1, 2, 3, 4]]
    some = still(2, 4)
    some[:, 0, 0] = torch.tensor([2.4, 0.6])  # (2.4, 0.6) is nearest to column 2, row 1
    assert warp_backward(labels, some, "strict").tolist() == [[7, 2, 3, 4], [5, 6, 7, 8]]


def test_vspw_warp_is_off_by_up_to_half_a_pixel() -> None:
    """x samples x W / (W - 1) - 1/2; halves round to even.

    W = 4: 0, 1, 2, 3 sample -0.5, 0.83, 2.17, 3.5: columns 0, 1, 2 and 4, which is outside.
    W = 3: 0, 1, 2 sample -0.5, 1, 2.5: columns 0, 1, 2. (W = 3 wide, 3 high: nothing changes.)
    """
    four = rows("1234", "1234", "1234")
    assert warp_backward(four, still(3, 4), "vspw2021").tolist() == [[1, 2, 3, 0]] * 3
    three = rows("123", "456", "789")
    assert warp_backward(three, still(3, 3), "vspw2021").tolist() == three.tolist()
    # A flow of half a pixel: 0.5, 1.5, 2.5 sample 0.25, 1.75, 3.25, and strict 0.5, 1.5, 2.5.
    half = still(3, 3)
    half[0] = 0.5
    assert warp_backward(three, half, "vspw2021")[0].tolist() == [1, 3, 0]
    assert warp_backward(three, half, "strict")[0].tolist() == [1, 3, 3]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"flow: expected shape \(2, 2, 4\)"):
        warp_backward(rows("1234", "1234"), still(4, 2), "strict")
    for call in (
        lambda: warp_backward(rows("1"), still(1, 1), "vspw"),
        lambda: TemporalConsistency(2, protocol="vspw"),
        lambda: VideoConsistency(2, protocol="vspw"),
        lambda: VideoMetrics(2, protocol="vspw"),
    ):
        with pytest.raises(ValueError, match="protocol: 'vspw' is not one of vspw2021, strict"):
            call()
    with pytest.raises(ValueError, match="window: 0 frames"):
        VideoConsistency(0)


# --- TC


def tc_of(
    protocol: str, videos: list[list[torch.Tensor]], **options: object
) -> TemporalConsistency:
    metric = TemporalConsistency(4, protocol=protocol, **options)  # type: ignore[arg-type]
    for number, video in enumerate(videos):
        metric.start(number)
        for frame in video:
            metric.update(frame, flow=still(*frame.shape))
    return metric


def test_tc_strict_by_hand() -> None:
    """Pair 1: (1 1 2 / 1 1 2 / 3 3 3), then the same but for one 2 that becomes 1; pair 2: no
    change.

    Class 1: 4 + 5 earlier, 5 + 5 later, 9 both: 9/10. Class 2: 2 + 1, 1 + 1, 2 both: 2/3.
    Class 3: 6/6.
    """
    first, second = rows("112", "112", "333"), rows("112", "111", "333")
    score = tc_of("strict", [[first, second, second]]).compute()
    assert score.score == pytest.approx((9 / 10 + 2 / 3 + 1) / 3, abs=1e-12)
    assert (score.pairs, score.protocol) == (2, "strict")
    assert score.flow == "exact (given with the frames)"


def test_tc_pools_pixels_of_all_videos_and_no_pair_joins_two() -> None:
    a, b = rows("11", "11"), rows("22", "22")
    metric = tc_of("strict", [[a, a], [b, b], [a], [a, b]])
    assert metric.pairs == 3
    # Class 1: 4 of 8 earlier agree, none more later: 4/8. Class 2: 4 of 8 later: 4/8.
    assert metric.compute().score == pytest.approx(0.5)


def test_tc_vspw_counts_what_comes_from_outside_as_class_0() -> None:
    """Even sides lose their last row and column to class 0 although nothing moves.

    4x4 of class 1: 9 pixels stay, 7 become 0. Class 1: 9/16. Class 0 has a union but is no earlier
    prediction, so VSPW's mean leaves it out; the mean over classes with a union would be 9/32.
    """
    frame = torch.ones(4, 4, dtype=torch.int64)
    metric = tc_of("vspw2021", [[frame, frame]])
    assert metric.confusion.matrix.tolist()[1] == [7, 9, 0, 0]
    assert metric.compute().score == pytest.approx(9 / 16)
    assert metric.confusion.compute().mean_iou == pytest.approx(9 / 32)
    assert tc_of("strict", [[frame, frame]]).compute().score == 1.0


def test_strict_mean_takes_classes_that_appear_later() -> None:
    first, second = rows("111", "111", "111"), rows("112", "111", "111")
    assert tc_of("strict", [[first, second]]).compute().score == pytest.approx((8 / 9 + 0) / 2)
    assert tc_of("vspw2021", [[first, second]]).compute().score == pytest.approx(8 / 9)


def test_tc_only_the_first_videos_count() -> None:
    a, b = rows("111"), rows("222")
    videos = [[a, a], [a, b]]
    assert tc_of("strict", videos, max_videos=1).pairs == 1
    assert tc_of("strict", videos, max_videos=None).pairs == 2
    metric = TemporalConsistency(3, protocol="strict")
    for video, pairs in ((99, 1), (100, 1)):
        metric.start(video)
        for _ in range(2):
            metric.update(a, flow=still(1, 3))
        assert metric.pairs == pairs


def test_tc_asks_the_flow_function_for_this_frame_to_the_next() -> None:
    class Flow:
        name = "a test's"

        def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            assert int(first.max()) == 7 and int(second.max()) == 9
            flow = still(1, 3)
            flow[0] = 1
            return flow

    metric = TemporalConsistency(4, Flow(), protocol="strict")
    metric.start(0)
    metric.update(rows("123"), image=torch.full((3, 1, 3), 7, dtype=torch.uint8))
    metric.update(rows("012"), image=torch.full((3, 1, 3), 9, dtype=torch.uint8))
    # Warped back: 1, 2, and 0 from outside, against 1, 2, 3.
    assert metric.confusion.matrix.diagonal().tolist() == [0, 1, 1, 0]
    assert metric.confusion.matrix[3, 0] == 1
    assert metric.compute().flow == "a test's"
    with pytest.raises(ValueError, match="image: a test's needs the frames"):
        metric.update(rows("012"))


def test_tc_without_a_flow_or_a_pair() -> None:
    metric = TemporalConsistency(4)
    assert math.isnan(metric.compute().score)
    metric.start(0)
    metric.update(rows("11"))
    with pytest.raises(ValueError, match="flow: none is given"):
        metric.update(rows("11"))


# --- VC


def vc_of(
    n: int, protocol: str, videos: list[tuple[list[torch.Tensor], list[torch.Tensor]]]
) -> VideoConsistency:
    metric = VideoConsistency(n, protocol=protocol)
    for predictions, labels in videos:
        metric.start()
        for prediction, label in zip(predictions, labels, strict=True):
            metric.update(prediction, label)
    return metric


TRUTH = [rows("1122"), rows("1122"), rows("1112"), rows("1112")]
SEEN = [rows("1133"), rows("1133"), rows("1133"), rows("1233")]


def test_vc_by_hand() -> None:
    """n = 2, L = 4. Ground truth constant: pixels 0-3, then 0, 1, 3, then 0-3.

    The prediction is constant at all pixels in windows 0 and 1, and at 0, 2, 3 in window 2.
    vspw2021: windows 0 and 1: 4/4, 3/3. strict: right and constant: 2/4, 2/3 and 1/4.
    """
    published = vc_of(2, "vspw2021", [(SEEN, TRUTH)]).compute()
    assert (published.score, published.windows, published.empty) == (1.0, 2, 0)
    strict = vc_of(2, "strict", [(SEEN, TRUTH)]).compute()
    assert strict.score == pytest.approx((2 / 4 + 2 / 3 + 1 / 4) / 3, abs=1e-12)
    assert (strict.windows, strict.window, strict.protocol) == (3, 2, "strict")


def test_vc_takes_all_frames_of_a_window() -> None:
    """n = 3. Constant over frames 0-2: pixels 0, 1, 3; over 1-3: the same. What changes and comes
    back between is not constant."""
    published = vc_of(3, "vspw2021", [(SEEN, TRUTH)]).compute()
    assert (published.score, published.windows) == (1.0, 1)
    strict = vc_of(3, "strict", [(SEEN, TRUTH)]).compute()
    assert strict.score == pytest.approx((2 / 3 + 1 / 3) / 2)
    blink = [rows("1"), rows("2"), rows("1"), rows("1")]
    steady = [rows("1")] * 4
    assert vc_of(3, "vspw2021", [(blink, steady)]).compute().score == 0.0


def test_vc_short_videos() -> None:
    """vspw2021 skips videos with L <= n, strict those with L < n."""
    one, video = rows("1"), ([rows("1")] * 2, [rows("1")] * 2)
    assert vc_of(2, "vspw2021", [video]).compute().windows == 0
    assert math.isnan(vc_of(2, "vspw2021", [video]).compute().score)
    assert vc_of(2, "strict", [video]).compute().windows == 1
    assert vc_of(2, "strict", [([one], [one])] * 3).compute().windows == 0


def test_vc_empty_windows_are_skipped_and_counted() -> None:
    """The only pixel's ground truth changes between frames 1 and 2."""
    truth = [rows("1"), rows("1"), rows("2"), rows("2"), rows("2")]
    seen = [rows("1"), rows("1"), rows("1"), rows("1"), rows("2")]
    published = vc_of(2, "vspw2021", [(seen, truth)]).compute()
    assert (published.score, published.windows, published.empty) == (1.0, 2, 1)
    strict = vc_of(2, "strict", [(seen, truth)]).compute()
    assert (strict.score, strict.windows, strict.empty) == (1 / 3, 3, 1)


def test_vc_unlabelled_pixels() -> None:
    """vspw2021 takes 255 for a class like others; strict leaves it out."""
    truth = [torch.tensor([[1, 255]])] * 3
    seen = [rows("12"), rows("12"), rows("13")]
    assert vc_of(2, "vspw2021", [(seen, truth)]).compute().score == 1.0
    wrong = [rows("12"), rows("13"), rows("13")]
    assert vc_of(2, "vspw2021", [(wrong, truth)]).compute().score == 0.5
    assert vc_of(2, "strict", [(wrong, truth)]).compute().score == 1.0
    nothing = [torch.tensor([[255]])] * 3
    strict = vc_of(2, "strict", [([rows("1")] * 3, nothing)]).compute()
    assert (strict.windows, strict.empty) == (0, 2)


def test_vc_is_the_mean_over_windows_not_videos() -> None:
    good, bad = [rows("1")] * 5, [rows("1"), rows("2"), rows("1")]
    videos = [(good, [rows("1")] * 5), (bad, [rows("1")] * 3)]
    assert vc_of(2, "vspw2021", videos).compute().score == pytest.approx(3 / 4)  # 3 and 1 windows
    assert vc_of(2, "strict", videos).compute().score == pytest.approx(4 / 6)


def definition(
    n: int, protocol: str, predictions: torch.Tensor, labels: torch.Tensor
) -> tuple[list[float], int]:
    """The ratios of all windows by their definition, and the number of empty ones."""
    ratios, empty = [], 0
    last = len(labels) - n + (protocol == "strict")
    for i in range(last):
        truth = (labels[i : i + n] == labels[i]).all(0)
        constant = (predictions[i : i + n] == predictions[i]).all(0)
        if protocol == "strict":
            truth &= labels[i] != 255
            constant &= predictions[i] == labels[i]
        if truth.any():
            ratios.append(int((truth & constant).sum()) / int(truth.sum()))
        else:
            empty += 1
    return ratios, empty


@pytest.mark.parametrize("protocol", ["vspw2021", "strict"])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_vc_against_its_definition(protocol: str, n: int, generator: torch.Generator) -> None:
    ratios, empty, metric = [], 0, VideoConsistency(n, protocol=protocol)
    for length in (3, 8, 12, 20):
        changes = torch.rand(2, length, 3, 5, generator=generator) < 0.2
        values = torch.randint(3, (2, length, 3, 5), generator=generator)
        for t in range(1, length):
            values[:, t] = torch.where(changes[:, t], values[:, t], values[:, t - 1])
        predictions, labels = values[0], torch.where(values[1] == 2, 255, values[1])
        found = definition(n, protocol, predictions, labels)
        ratios, empty = ratios + found[0], empty + found[1]
        metric.start()
        for prediction, label in zip(predictions, labels, strict=True):
            metric.update(prediction, label)
    score = metric.compute()
    assert (score.windows, score.empty) == (len(ratios), empty)
    assert score.score == pytest.approx(np.mean(ratios), abs=1e-12)
    assert metric.compute() == score, "computing changes nothing"


def test_vc_shapes() -> None:
    metric = VideoConsistency(2)
    metric.start()
    metric.update(rows("12"), rows("12"))
    with pytest.raises(ValueError, match=r"prediction: shape \(1, 3\), expected \(1, 2\)"):
        metric.update(rows("123"), rows("12"))
    with pytest.raises(ValueError, match=r"label: shape \(1, 3\), expected \(1, 2\)"):
        metric.update(rows("12"), rows("123"))


# --- all together


def test_all_scores_in_one_pass() -> None:
    metrics = VideoMetrics(4, protocol="strict", windows=(2, 3), flow="given")
    metrics.start(0)
    for prediction, label in zip(SEEN, TRUTH, strict=True):
        metrics.update(prediction, label, flow=still(1, 4))
    scores = metrics.compute()
    assert scores.vc[0] == vc_of(2, "strict", [(SEEN, TRUTH)]).compute()
    assert scores.vc[1] == vc_of(3, "strict", [(SEEN, TRUTH)]).compute()
    assert scores.tc == tc_of("strict", [SEEN]).compute()
    assert scores.frames.pixel_accuracy == 7 / 16
    stored = scores.as_dict()
    assert stored["tc_pairs"] == 3 and stored["vc2_windows"] == 3 and stored["protocol"] == "strict"
    table = scores.table()
    assert table.splitlines()[0] == "protocol strict"
    assert "3 pairs, flow: exact (given with the frames)" in table and "VC3" in table


def test_mean_iou_follows_the_protocol() -> None:
    for protocol, expected in (("vspw2021", 0.5), ("strict", 0.25)):
        metrics = VideoMetrics(3, protocol=protocol, windows=())
        metrics.start(0)
        metrics.update(rows("12"), rows("11"))  # class 2 is predicted and never true
        assert metrics.compute().mean_iou == expected
        assert metrics.compute().tc is None


def test_a_frame_without_a_label_breaks_the_windows() -> None:
    metrics = VideoMetrics(4, protocol="strict", windows=(2,), flow="given")
    metrics.start(0)
    for label in (rows("1"), rows("1"), None, rows("1"), rows("1"), rows("1")):
        metrics.update(rows("1"), label, flow=still(1, 1))
    scores = metrics.compute()
    assert scores.vc[0].windows == 3 and scores.tc.pairs == 5
    assert int(metrics.confusion.matrix.sum()) == 5


def test_nothing_counted_is_none_in_json() -> None:
    scores = VideoMetrics(4, windows=(8,), flow="given").compute().as_dict()
    assert scores["tc"] is None and scores["vc8"] is None and scores["mean_iou"] is None
    assert "-" in VideoMetrics(4, windows=(8,), flow="given").compute().table()


def test_reduce_without_process_group_is_a_copy() -> None:
    metrics = VideoMetrics(4, protocol="strict", windows=(2,), flow="given")
    metrics.start(0)
    for prediction, label in zip(SEEN, TRUTH, strict=True):
        metrics.update(prediction, label, flow=still(1, 4))
    total = metrics.reduce()
    assert total.compute().as_dict() == metrics.compute().as_dict()
    metrics.update(SEEN[0], TRUTH[0], flow=still(1, 4))
    assert total.compute().vc[0].windows == 3 and total.compute().tc.pairs == 3

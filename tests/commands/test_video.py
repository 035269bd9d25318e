"""`mcibi-fast video`: files, folders, cameras, broken frames, interrupts, bad input."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mcibi_fast.cli import main
from mcibi_fast.inference import video_io as video_files
from mcibi_fast.inference.stream import VideoPredictor, VideoStream
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec, pack_weights
from mcibi_fast.recipes import TrainConfig, VideoData

ROOT = Path(__file__).resolve().parents[2]
K, SIZE = 4, (40, 56)
PALETTE = [[250, 60 * k, 0] for k in range(K)]
NAMES = {"image": "fcn_mcibipp", "video": "fcn_video_mcibipp", "plain": "fcn"}


@pytest.fixture(scope="module")
def cv2():
    return pytest.importorskip("cv2", reason="needs OpenCV (pip install mcibi-fast[video])")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder, files = tmp_path_factory.mktemp("checkpoints"), {}
    for kind, name in NAMES.items():
        options = {"feats_channels": 8} | ({} if kind == "plain" else {"transform_channels": 8})
        spec = ModelSpec(
            name=name, backbone="test_resnet", options=options,
            classes=[f"c{k}" for k in range(K)], palette=PALETTE,
            mean=[0.5] * 3, std=[0.2] * 3,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = create_model(spec)
        files[kind] = folder / f"{kind}.safetensors"
        files[kind].write_bytes(pack_weights(model, spec))
    return files


def frames(count: int) -> list[np.ndarray]:
    """A bright bar that moves over noise."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 90, (count, *SIZE, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        picture[:, 2 * i : 2 * i + 8] = 220
    return list(pictures)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve frames, f1.png to f12.png."""
    path = tmp_path / "frames"
    path.mkdir()
    for i, picture in enumerate(frames(12), start=1):
        Image.fromarray(picture).save(path / f"f{i}.png")
    return path


@pytest.fixture
def video_file(cv2, tmp_path) -> Path:
    """Twelve frames, 10 in a second."""
    path = tmp_path / "drive.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, SIZE[::-1])
    for picture in frames(12):
        writer.write(np.ascontiguousarray(picture[..., ::-1]))
    writer.release()
    return path


def masks(out: Path) -> dict[str, np.ndarray]:
    return {p.stem: np.array(Image.open(p)) for p in sorted((out / "labels").iterdir())}


def played(cv2, path: Path) -> tuple[int, float, tuple[int, int]]:
    """Frames that can be read of a video, frames per second, (height, width)."""
    capture, count, shape = cv2.VideoCapture(str(path)), 0, (0, 0)
    while (read := capture.read())[0]:
        count, shape = count + 1, read[1].shape[:2]
    return count, capture.get(cv2.CAP_PROP_FPS), shape


@pytest.mark.parametrize("kind", ["image", "video", "plain"])
def test_a_folder(kind, checkpoints, folder, tmp_path, capsys):
    """Masks are the stream's, in the order of the numbers; a folder needs no OpenCV."""
    from mcibi_fast.data.base import normalise
    from mcibi_fast.models.checkpoint import load_model

    out, checkpoint = tmp_path / "out", str(checkpoints[kind])
    assert main(["video", checkpoint, str(folder), "--out", str(out), "--no-overlay", "--cpu"]) == 0
    assert "12 label maps in" in capsys.readouterr().out
    assert not (out / "overlay.mp4").exists()
    got = masks(out)
    model, spec = load_model(checkpoint)
    predictor = VideoPredictor(model)
    for i, picture in enumerate(frames(12), start=1):
        image = normalise(torch.from_numpy(picture).permute(2, 0, 1), spec.mean, spec.std)
        with torch.no_grad():
            expected = predictor.predict(image, SIZE).numpy()
        assert np.array_equal(got[f"f{i}"], expected)


@pytest.mark.parametrize("options", ["", "--fold", "--stages 2", "--window 32,32 --flip"])
def test_a_video_file(options, checkpoints, video_file, tmp_path, cv2, capsys):
    out = tmp_path / "out"
    command = ["video", str(checkpoints["video"]), str(video_file), "--out", str(out), "--cpu"]
    assert main([*command, *options.split()]) == 0
    assert "12 label maps and overlay.mp4 in" in capsys.readouterr().out
    assert played(cv2, out / "overlay.mp4") == (12, 10.0, SIZE)
    assert list(masks(out)) == [f"{i:06d}" for i in range(12)]
    assert all(mask.shape == SIZE and mask.max() < K for mask in masks(out).values())
    assert sorted(p.name for p in out.iterdir()) == ["labels", "overlay.mp4"]


def test_the_overlay_shows_the_frames(checkpoints, video_file, tmp_path, cv2):
    """Colours are not swapped: the overlay is nearer to frame and palette than to its mirror."""
    out = tmp_path / "out"
    main(["video", str(checkpoints["image"]), str(video_file), "--out", str(out), "--cpu"])
    from mcibi_fast.viz.overlay import blend

    picture = cv2.VideoCapture(str(out / "overlay.mp4")).read()[1][..., ::-1].astype(float)
    palette = np.array(PALETTE, np.uint8)
    expected = blend(frames(1)[0], masks(out)["000000"], palette).astype(float)
    near, far = (np.abs(picture - e).mean() for e in (expected, expected[..., ::-1]))
    assert near < far / 2


def test_at_the_runs_test_size(checkpoints, video_file, tmp_path, monkeypatch):
    """Frames are resized as the run's evaluation did; masks keep the frames' size."""
    run, seen = tmp_path / "run", []
    run.mkdir()
    shutil.copy(checkpoints["video"], run / "model.safetensors")
    config = TrainConfig(data=VideoData("vspw", short_side=24))
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    step = VideoStream.__call__
    monkeypatch.setattr(
        VideoStream, "__call__", lambda self, x: (seen.append(tuple(x.shape[2:])), step(self, x))[1]
    )
    for options in ([], ["--own-size"]):
        out = tmp_path / f"out{len(options)}"
        command = ["video", str(run), str(video_file), "--limit", "1", "--out", str(out), "--cpu"]
        assert main([*command, *options]) == 0
        assert masks(out)["000000"].shape == SIZE
    assert seen == [(24, 34), SIZE]


def test_every_and_limit(checkpoints, video_file, folder, tmp_path, cv2):
    for source, names in (
        (video_file, ["000000", "000003", "000006"]),
        (folder, ["f1", "f4", "f7"]),
    ):
        out = tmp_path / f"out_{source.stem}"
        options = ["--every", "3", "--limit", "3", "--out", str(out), "--cpu"]
        assert main(["video", str(checkpoints["video"]), str(source), *options]) == 0
        assert list(masks(out)) == names
        assert played(cv2, out / "overlay.mp4")[0] == 3
    assert played(cv2, tmp_path / "out_drive" / "overlay.mp4")[1] == pytest.approx(10 / 3, abs=0.01)


def test_broken_frames_in_a_folder(checkpoints, folder, tmp_path, capsys):
    (folder / "f3.png").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(folder / "f5.png")
    out = tmp_path / "out"
    command = ["video", str(checkpoints["video"]), str(folder), "--out", str(out), "--cpu"]
    assert main([*command, "--no-overlay"]) == 0
    assert len(masks(out)) == 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mcibi-fast: warning: 2 frames left out:") and "f3.png: empty" in line

    (folder / "f3.png").unlink()
    (folder / "._f4.png").write_bytes(b"what macOS leaves")
    assert main([*command, "--no-overlay"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("1 frames left out: f5: 8x8, the first frame has 56x40")


def test_a_video_file_that_was_cut_off(checkpoints, video_file, tmp_path, cv2, capsys):
    video_file.write_bytes(video_file.read_bytes()[: video_file.stat().st_size * 2 // 3])
    out = tmp_path / "out"
    assert (
        main(["video", str(checkpoints["video"]), str(video_file), "--out", str(out), "--cpu"]) == 0
    )
    done = len(masks(out))
    assert 4 <= done < 12 and played(cv2, out / "overlay.mp4")[0] == done
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == f"mcibi-fast: warning: drive.avi: ends after {done} frames, though it announces 12"
    )


def test_frames_beyond_an_announced_end(checkpoints, video_file, tmp_path, monkeypatch, capsys):
    """A container's number of frames may be wrong either way, or missing."""
    count = video_files.CapturedFrames.__init__

    def announce(number):
        def init(self, source, *, every=1):
            count(self, source, every=every)
            self.count = number

        monkeypatch.setattr(video_files.CapturedFrames, "__init__", init)

    short = "ends after 12 frames, though it announces"
    for number, said in ((0, ""), (9, ""), (14, ""), (30, short), (500, short)):
        announce(number)
        out = tmp_path / f"out{number}"
        assert (
            main(["video", str(checkpoints["plain"]), str(video_file), "--out", str(out), "--cpu"])
            == 0
        )
        assert len(masks(out)) == 12
        printed = capsys.readouterr().err
        assert said in printed and bool(said) == bool(printed)


def test_a_video_file_without_frames(checkpoints, video_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video_files.CapturedFrames, "_read", lambda self, wanted: None)
    command = [str(checkpoints["plain"]), str(video_file), "--out", str(tmp_path / "out"), "--cpu"]
    assert "drive.avi: no frame could be used (drive.avi: ends after 0" in error(capsys, *command)


def test_a_video_that_cannot_be_written(checkpoints, folder, tmp_path, capsys, cv2):
    out = ["--out", str(tmp_path / "out"), "--cpu"]
    line = error(capsys, str(checkpoints["plain"]), str(folder), *out, "--every", "100000")
    assert "overlay.mp4: OpenCV cannot write 56x40 at 0.00025 frames per second" in line


def test_a_full_disk_is_an_error(checkpoints, video_file, tmp_path, capsys, cv2):
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, before[1]))  # no file may be larger
    try:
        line = error(capsys, str(checkpoints["plain"]), str(video_file), "--out", str(out), "--cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line.endswith("overlay.mp4: could not be written whole; is the disk full?")
    assert [p.name for p in out.iterdir()] == ["labels"] and len(masks(out)) == 12


def shown(cv2, path: Path) -> tuple[list[float], float]:
    """When each frame is shown, and how long the video is, in seconds."""
    capture, times = cv2.VideoCapture(str(path)), []
    while capture.grab():
        times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    return times, capture.get(cv2.CAP_PROP_FRAME_COUNT) / capture.get(cv2.CAP_PROP_FPS)


VARIABLE = [0.0, 0.1, 0.2, 0.3, 0.8, 1.3, 1.8, 1.85, 1.9, 2.0]


@pytest.fixture
def variable(cv2, tmp_path) -> Path:
    """Ten frames at 2 to 20 frames per second; the last one is shown for two seconds."""
    writer = video_files.VideoWriter(tmp_path / "variable.mp4", 10)
    for picture, time_shown in zip(frames(10), VARIABLE, strict=True):
        writer.add(picture, time_shown)
    writer.close(4.0)
    assert shown(cv2, writer.path) == (pytest.approx(VARIABLE), pytest.approx(4))
    return writer.path


def test_a_variable_frame_rate_keeps_its_times(checkpoints, variable, tmp_path, cv2):
    for options, times, end in (
        ([], VARIABLE, 4),
        (["--every", "3"], VARIABLE[::3], 4),
        (["--limit", "5"], VARIABLE[:5], VARIABLE[4] + 1 / 2.5),
    ):
        out = tmp_path / f"out{len(times)}"
        command = ["video", str(checkpoints["plain"]), str(variable), "--out", str(out), "--cpu"]
        assert main([*command, *options]) == 0
        assert shown(cv2, out / "overlay.mp4") == (pytest.approx(times), pytest.approx(end))


@pytest.mark.parametrize("fps", [240.013, 655.352, 59.94006, 23.976])
def test_any_frame_rate(fps, cv2, tmp_path):
    writer = video_files.VideoWriter(tmp_path / "fast.mp4", fps)
    for picture in frames(5) * 6:
        writer.add(picture)
    writer.close()
    times, end = shown(cv2, writer.path)
    assert times == pytest.approx([i / fps for i in range(30)], abs=0.5 / fps)
    assert end == pytest.approx(30 / fps, abs=0.5 / fps)


def test_what_is_left_out_shortens_nothing(checkpoints, folder, tmp_path, cv2):
    for number in (5, 6, 12):
        (folder / f"f{number}.png").write_bytes(b"")
    out = tmp_path / "out"
    assert main(["video", str(checkpoints["plain"]), str(folder), "--out", str(out), "--cpu"]) == 0
    times = [i / 25 for i in range(12) if i not in (4, 5, 11)]
    assert shown(cv2, out / "overlay.mp4") == (pytest.approx(times), pytest.approx(12 / 25))


def test_a_slow_camera_is_shown_as_it_was_seen(checkpoints, tmp_path, monkeypatch, cv2):
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    clock = iter([100.0, 100.5, 101.5, 103.0, 104.0, 104.5])
    monkeypatch.setattr(video_files.time, "monotonic", lambda: next(clock))
    out = tmp_path / "out"
    assert main(["video", str(checkpoints["plain"]), "3", "--out", str(out), "--cpu"]) == 0
    monkeypatch.undo()
    times, end = shown(cv2, out / "overlay.mp4")
    assert times == pytest.approx([0, 0.5, 1.5, 3, 4, 4.5]) and end == pytest.approx(4.5 + 1 / 25)


def test_odd_sides(checkpoints, tmp_path, cv2):
    source = tmp_path / "odd"
    source.mkdir()
    for i in range(3):
        Image.new("RGB", (57, 41), (60 * i, 9, 9)).save(source / f"{i}.png")
    out = tmp_path / "out"
    assert main(["video", str(checkpoints["plain"]), str(source), "--out", str(out), "--cpu"]) == 0
    assert played(cv2, out / "overlay.mp4")[2] == (42, 58)
    assert masks(out)["0"].shape == (41, 57)


def test_a_frame_that_fails_amid_a_video_file(
    checkpoints, video_file, tmp_path, monkeypatch, capsys
):
    original = video_files.CapturedFrames._read
    calls = []

    def fails_once(self, wanted):
        calls.append(wanted)
        frame = original(self, wanted)
        return None if len(calls) == 5 else frame

    monkeypatch.setattr(video_files.CapturedFrames, "_read", fails_once)
    out = tmp_path / "out"
    assert (
        main(["video", str(checkpoints["video"]), str(video_file), "--out", str(out), "--cpu"]) == 0
    )
    assert list(masks(out)) == [f"{i:06d}" for i in range(12) if i != 4]
    assert "1 frames left out: frame 4: cannot be read" in capsys.readouterr().err


class Camera:
    """Stands for cv2.VideoCapture of a camera that stops after some frames."""

    def __init__(self, source):
        assert source == 3
        self.left = frames(6)

    def isOpened(self):
        return True

    def get(self, what):
        return 0.0

    def grab(self):
        self.frame = self.left.pop(0) if self.left else None
        return self.frame is not None

    def retrieve(self):
        return True, np.ascontiguousarray(self.frame[..., ::-1])

    def release(self):
        pass


def test_a_camera(checkpoints, tmp_path, monkeypatch, cv2, capsys):
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    for options, count in ((["--limit", "4"], 4), ([], 6)):
        out = tmp_path / f"out{count}"
        command = ["video", str(checkpoints["video"]), "3", "--out", str(out), "--cpu", *options]
        assert main(command) == 0
        assert len(masks(out)) == count
    assert capsys.readouterr().err == "mcibi-fast: warning: camera 3: gives no more frames\n"


def error(capsys, *command: str) -> str:
    assert main(["video", *command]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    return line


def test_bad_input(checkpoints, folder, tmp_path, capsys, cv2):
    checkpoint, out = str(checkpoints["video"]), ["--out", str(tmp_path / "out"), "--cpu"]
    text, empty, frames = tmp_path / "notes.mp4", tmp_path / "empty", str(folder)
    text.write_text("no video")
    empty.mkdir()
    for source, message in {
        str(text): "is no video that OpenCV can read",
        "97": "camera 97: is not there or in use",
        str(tmp_path / "missing.mp4"): "there is no such video, folder or camera",
        str(empty): "holds no pictures",
        str(folder / "f1.png"): "is a picture; mcibi-fast predict takes pictures",
    }.items():
        assert message in error(capsys, checkpoint, source, *out)
    for kind, options, message in (
        ("video", ["--every", "0"], "every: expected at least 1"),
        ("video", ["--limit", "0"], "limit: expected at least 1"),
        ("plain", ["--stages", "2"], "inference.stages: FCNHead has no memory"),
        ("plain", ["--fold"], "--fold: needs a model with a memory; fcn has none"),
    ):
        assert message in error(capsys, str(checkpoints[kind]), frames, *options, *out)
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert "no frame could be used" in error(capsys, checkpoint, frames, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_line_and_nothing_of_ffmpegs(checkpoints, tmp_path, cv2):
    text = tmp_path / "notes.mp4"
    text.write_text("no video")
    command = [sys.executable, "-m", "mcibi_fast.cli", "video", str(checkpoints["video"])]
    process = subprocess.run(
        [*command, str(text), "--cpu"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1 and "is no video" in process.stderr


def test_without_opencv(checkpoints, folder, video_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    checkpoint, out = str(checkpoints["video"]), ["--out", str(tmp_path / "out"), "--cpu"]
    for source, what in ((video_file, "video files and cameras"), (folder, "an overlaid video")):
        line = error(capsys, checkpoint, str(source), *out)
        assert what in line
        assert 'needs opencv-python-headless: pip install "mcibi-fast[video]"' in line
    assert main(["video", checkpoint, str(folder), "--no-overlay", *out]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.thinned(only={"number": [signal.SIGTERM]})
def test_ctrl_c_keeps_what_was_done(number, checkpoints, tmp_path, cv2):
    source, out = tmp_path / "long", tmp_path / "out"
    source.mkdir()
    Image.fromarray(frames(1)[0]).save(source / "0.png")
    for i in range(1, 2400):
        (source / f"{i}.png").hardlink_to(source / "0.png")
    (source / "00.png").write_bytes(b"")
    command = [sys.executable, "-m", "mcibi_fast.cli", "video", str(checkpoints["video"])]
    process = subprocess.Popen(
        [*command, str(source), "--out", str(out), "--cpu", "--quiet"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(out.glob("labels/*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    done = len(masks(out))
    assert process.returncode == 130
    assert errors.startswith(f"mcibi-fast: stopped; {done} frames are kept in {out}, ")
    assert f" frames per second; 1 frames left out: {source / '00.png'}: empty" in errors
    assert 3 <= done < 2400 and played(cv2, out / "overlay.mp4")[0] == done

"""`mcibi-fast data check` of video datasets: frames per video, missing frames, odd values."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.data import check_named
from mcibi_fast.data.check_video import absent, video_lines
from tests.data import trees


def test_vspw(tmp_path: Path) -> None:
    root = trees.vspw(tmp_path)
    home = root / "VSPW_480p" / "data"
    for kind, suffix in (("origin", ".jpg"), ("mask", ".png")):  # 3_c: frames 10, 11, 15
        file = next((home / "3_c" / kind).glob(f"*11{suffix}"))
        shutil.copy(file, file.with_name(f"00000015{suffix}"))
    shutil.rmtree(home / "4_d" / "mask")
    values = np.full(trees.SIZE, 3, np.uint8)
    values[0, :5] = [252, 252, 253, 254, 200]
    Image.fromarray(values).save(home / "1_a" / "mask" / "00000010.png")
    report = check_named("vspw", root, tmp_path / "out", progress=False)
    assert report.ok and report.pairs == {"train": 5, "val": 3, "test": 0}
    text = report.text()
    for line in (
        "videos   train 2 (2..3 frames, median 2.5)",
        "videos   val 1 (3..3 frames, median 3)",
        "3 frame numbers of val are left out, in 1 videos; most in 3_c (3)",
        "2 frames of test have no mask",
        "warning  train has 2 videos; in VSPW it has 2,806",
        "warning  train has 5 images; in VSPW it has 198,244",
        "1 masks hold values that are no class; the pixels are ignored: "
        "200 (1), 252 (2), 253 (1), 254 (1)",
        "sizes    18x12 (10)",
        "classes  124",
        "no problems",
    ):
        assert line in text
    masks = 12 * 18 * 8
    assert report.pixels.sum() + report.ignored == masks, "frames without masks count nowhere"
    assert report.images[2] == 8
    assert len(report.overlays) == 4


def test_problems_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = trees.vspw(tmp_path / "tree")
    home = root / "VSPW_480p" / "data"
    (home / "1_a" / "origin" / "00000010.jpg").write_bytes(b"")
    Image.new("RGB", (18, 12)).save(home / "1_a" / "mask" / "00000011.png")
    (home / "1_a" / "mask" / "00000012.png").unlink()
    (home / "2_b" / "origin" / "00000011.jpg").unlink()
    trees.write_list(root / "VSPW_480p" / "test.txt", ["4_d", "5_gone"])
    out = str(tmp_path / "out")
    assert cli.main(["data", "check", "vspw", str(root), "--out", out, "--quiet"]) == 2
    printed = capsys.readouterr().out
    for line in (
        "data/1_a/origin/00000010.jpg: empty (0 bytes)",
        "data/1_a/mask/00000011.png: a colour mask (RGB)",
        "data/1_a/mask/00000012.png: missing",
        "data/2_b/origin/00000011.jpg: missing",
        "data/5_gone/origin/*.jpg: missing",
    ):
        assert line in printed
    assert "splits   train 1, val 2, test 2" in printed


def test_counts() -> None:
    assert absent([1, 2, 3]) == absent([7]) == absent([]) == absent([10, 40, 70]) == 0
    assert absent([10, 40, 70, 160, 191]) == 2  # 31 is no gap
    assert video_lines("val", {}) == []
    (line,) = video_lines("val", {"a": [1, 2, 3, 4], "b": [5, 6]})
    assert line == "videos   val 2 (2..4 frames, median 3)"


def test_camvid(camvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On links to its train frames of one video, around its jump."""
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
        files = sorted((camvid / kind / "train").glob("0016E5*"))
        for file in files[:3] + files[-3:]:
            (tmp_path / kind / "train" / file.name).symlink_to(file)
    out = str(tmp_path / "out")
    assert cli.main(["data", "check", "camvid", str(tmp_path), "--out", out, "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "videos   train 1 (6..6 frames, median 6)" in printed
    assert "most in 0016E5" in printed

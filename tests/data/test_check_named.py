"""`mcibi-fast data check NAME ROOT`, on every published dataset."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.data import DATASETS, DataError, check_named
from tests.data import trees


@pytest.mark.parametrize("name", list(DATASETS))
def test_a_whole_dataset(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = trees.WRITERS[name](tmp_path / "data"), tmp_path / "out"
    status = cli.main(["data", "check", name, str(root), "--out", str(out), "--quiet"])
    printed, errors = capsys.readouterr()
    assert (status, errors) == (0, "")
    cls = DATASETS[name]
    samples = [cls(root, split) for split in cls.checked]
    assert f"splits   {', '.join(f'{d.split} {len(d)}' for d in samples)}" in printed
    for line in ("18x12", f"classes  {len(cls.classes)}", "no problems", "255 ignored"):
        assert line in printed
    for dataset in samples:
        has = f"warning  {dataset.split} has {len(dataset)} images; in {cls.title} it has "
        assert has + f"{cls.sizes[dataset.split]:,}" in printed
    assert len(list(out.glob("overlay_*.png"))) == min(4, sum(map(len, samples)))


def test_histogram(tmp_path: Path) -> None:
    root = trees.voc(tmp_path)
    report = check_named("voc", root, progress=False)
    labels = [DATASETS["voc"](root, s).read(i)[1] for s, n in (("trainaug", 4), ("val", 1))
              for i in range(n)]  # fmt: skip
    counts = np.bincount(np.concatenate([x.ravel() for x in labels]), minlength=256)
    assert report.pixels.tolist() == counts[:21].tolist()
    assert report.ignored == counts[255]
    assert report.sizes == {(18, 12): 5}
    assert report.overlays == []


def test_camvid_by_its_name(
    camvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On links to a part of it, so that each split has too few."""
    for kind, split in product(("images", "labels"), ("train", "val", "test")):
        (tmp_path / kind / split).mkdir(parents=True)
        for file in sorted((camvid / kind / split).iterdir())[:2]:
            (tmp_path / kind / split / file.name).symlink_to(file)
    out = str(tmp_path / "out")
    assert cli.main(["data", "check", "camvid", str(tmp_path), "--out", out, "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "bicyclist" in printed
    for split, size in {"train": 367, "val": 101, "test": 233}.items():
        assert f"warning  {split} has 2 images; in the published set it has {size}" in printed


def test_the_right_size_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = trees.ade20k(tmp_path)
    monkeypatch.setattr(DATASETS["ade20k"], "sizes", {"train": 2, "val": 3})
    report = check_named("ade20k", root, progress=False)
    assert report.warnings == ["val has 1 images; in ADE20K it has 3"]
    assert report.ok


def test_goes_on_past_every_kind_of_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a zip file, as downloaded."""
    home = trees.cityscapes(tmp_path / "tree")
    (next(home.rglob("aachen*leftImg8bit.png"))).write_bytes(b"")
    next(home.rglob("bochum*labelIds.png")).unlink()
    Image.new("L", (18, 12), 77).save(next(home.rglob("lindau*labelIds.png")))
    archive = trees.pack(home, tmp_path / "all.zip")
    report = check_named("cityscapes", archive, progress=False)
    assert report.pairs == {"train": 0, "val": 0}
    assert report.problems == [
        "gtFine/train/bochum/bochum_000000_000313_gtFine_labelIds.png: missing",
        "all.zip/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png: empty (0 bytes); "
        "replace or remove it",
        "all.zip/gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png: value 77; the masks "
        "of Cityscapes hold 0..33, 255; unpack it again",
    ]
    assert report.warnings[0] == "train has 2 images; in Cityscapes it has 2,975"
    assert cli.main(["data", "check", "cityscapes", str(archive), "--quiet"]) == 2
    printed, errors = capsys.readouterr()
    assert "3 problems:" in printed
    assert errors == (
        "mcibi-fast: error: gtFine/train/bochum/bochum_000000_000313_gtFine_labelIds.png: missing "
        "(and 2 more above)\n"
    )


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    root = trees.lip(tmp_path)
    (root / "val_id.txt").unlink()
    report = check_named("lip", root, progress=False)
    assert report.pairs == {"train": 2, "val": 0}
    assert len(report.problems) == 1 and "no val_id.txt in it" in report.problems[0]


def test_many_problems_are_cut_short_in_the_text(tmp_path: Path) -> None:
    root = trees.lip(tmp_path)
    names = [f"gone_{i}" for i in range(60)]
    trees.write_list(root / "train_id.txt", ["77_471474", *names])
    report = check_named("lip", root, progress=False)
    assert len(report.problems) == 120
    assert "120 problems:" in report.text() and "  and 70 more" in report.text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ade", "."], "no dataset 'ade'; there are ade20k, lip, "),
        (["ade20k", "nothing"], "nothing: no such folder or zip file; expected ADEChallenge"),
        (["ade20k", "."], "no images/training in it; expected ADEChallengeData2016.zip, or"),
        (["a", "b", "c"], "expected [NAME] ROOT, got a b c"),
        (["ade20k", ".", "--classes", "a,b"], "--classes: a published dataset has its own"),
        ([], "required"),
    ],
)
def test_what_cannot_be_checked(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "check", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = {"image_id": 1, "file_name": "2008_000002.jpg", "height": 12, "width": 18}
    region = {
        "image_id": 1, "category_id": 397, "segmentation": {"size": [12, 18], "counts": [0, 216]},
    }  # fmt: skip
    trees.write_image(tmp_path / "VOC2010" / "JPEGImages" / "2008_000002.jpg")
    (tmp_path / "other.json").write_text(
        str({"images": [image | {"phase": "train"}], "annos_segmentation": [region]}).replace(
            "'", '"'
        )
    )
    arguments = ["data", "convert", "pascal_context", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "no trainval_merged.json in it" in capsys.readouterr().err
    assert cli.main([*arguments, "--annotations", str(tmp_path / "other.json")]) == 0
    assert "train 1, val 0" in capsys.readouterr().out
    dataset = DATASETS["pascal_context"](tmp_path, "train")
    assert {dataset.classes[c] for c in np.unique(dataset.read(0)[1])} == {"table"}
    with pytest.raises(DataError, match=r"val\.txt: lists nothing"):
        DATASETS["pascal_context"](tmp_path, "val")

"""Folders of Hugging Face's `datasets` (tried: 5.2.0) as data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.data import DataError, HuggingFaceDataset

datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")

H, W = 24, 32


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(255, size=(H, W, 3), dtype=np.uint8)


def mask(seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).integers(3, size=(H, W), dtype=np.uint8)
    found[0] = 255
    return found


def made(count: int = 3, *, first: int = 0, image: str = "image", label: str = "label") -> Any:
    rows = range(first, first + count)
    return datasets.Dataset.from_dict(
        {
            image: [Image.fromarray(pixels(i)) for i in rows],
            label: [Image.fromarray(mask(i)) for i in rows],
            "number": list(rows),
        }
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A DatasetDict whose classes are listed."""
    both = datasets.DatasetDict(train=made(4), validation=made(2, first=10))
    both.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/classes.txt").write_text("a\nb\nc\n")
    return tmp_path / "saved"


def test_a_dict_of_splits(root: Path) -> None:
    data = HuggingFaceDataset(root, "validation")
    assert (len(data), data.classes, data.name(1)) == (2, ["a", "b", "c"], "validation/000001")
    image, label = data.read(1)
    assert np.array_equal(image, pixels(11)) and np.array_equal(label, mask(11))
    assert label.dtype == np.uint8
    sample = data[0]
    assert sample["image"].shape == (3, H, W) and sample["label"].shape == (H, W)


def test_a_dataset_alone_and_one_in_memory(tmp_path: Path) -> None:
    made(image="photo", label="annotation").save_to_disk(tmp_path / "saved")
    columns = {"image": "photo", "label": "annotation"}
    for source in (tmp_path / "saved", made(**columns)):
        data = HuggingFaceDataset(source, **columns)
        assert data.classes == ["class_0", "class_1", "class_2"]  # counted
        assert np.array_equal(data.read(2)[0], pixels(2))
        assert np.array_equal(data.read(2)[1], mask(2))


def test_labels_as_arrays_and_reduced(tmp_path: Path) -> None:
    rows = made().remove_columns("label").add_column("label", [mask(i).tolist() for i in range(3)])
    data = HuggingFaceDataset(rows)
    assert np.array_equal(data.read(1)[1], mask(1)) and len(data.classes) == 3
    reduced = HuggingFaceDataset(rows, reduce_labels=True)
    assert len(reduced.classes) == 2
    expected = mask(1).astype(int) - 1
    expected[(mask(1) == 0) | (mask(1) == 255)] = 255
    assert np.array_equal(reduced.read(1)[1], expected)


@pytest.mark.parametrize("value", [3, 256])  # 256 is not 255, which is ignored
def test_a_label_too_large_to_be_reduced_is_named_as_it_is_stored(value: int) -> None:
    label = mask(0).astype(int)
    label[5, 6] = value
    rows = made(1).remove_columns("label").add_column("label", [label.tolist()])
    data = HuggingFaceDataset(rows, classes=["a", "b"], reduce_labels=True)
    with pytest.raises(DataError, match=rf"train/000000 \(label\): label {value} with 2 classes"):
        data.read(0)


def test_the_hint_at_reduced_labels() -> None:
    data = HuggingFaceDataset(made(1), classes=["a", "b"])
    with pytest.raises(DataError, match=r"label 2 with 2 classes; .*data\.reduce_labels=true"):
        data.read(0)


def jpeg(array: np.ndarray) -> dict[str, bytes]:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG")
    return {"bytes": file.getvalue(), "path": None}


def bad(column: str, value: Any) -> Any:
    other = {"image": "label", "label": "image"}[column]
    good = {"image": pixels, "label": mask}[other](0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    return datasets.Dataset.from_dict({column: [value], other: [Image.fromarray(good)]}, features)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", jpeg(mask(0)), "train/000000 (label): a mask in lossy compression"),
        ("label", Image.fromarray(pixels(0)), "train/000000 (label): a colour mask (RGB)"),
        ("label", Image.fromarray(mask(0) + 3), "train/000000 (label): label 3 with 3 classes"),
        ("label", None, "train/000000 (label): no image"),
        ("label", Image.fromarray(mask(0)[1:]), "train/000000"),  # another size
        ("image", {"bytes": b"nothing", "path": None}, "train/000000"),
        ("image", {"bytes": None, "path": "/etc/passwd"}, "stores a path and no image"),
        ("image", None, "train/000000 (image): no image"),
    ],
)
def test_a_bad_row_is_one_line(column: str, value: Any, message: str) -> None:
    data = HuggingFaceDataset(bad(column, value), classes=["a", "b", "c"])
    with pytest.raises(DataError) as caught:
        data.read(0)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_label_that_is_no_mask() -> None:
    rows = made().remove_columns("label").add_column("label", ["cat"] * 3)
    with pytest.raises(DataError, match=r"train/000000 \(label\): not an image, and no array"):
        HuggingFaceDataset(rows, classes=["a"]).read(0)


def test_what_is_missing_is_one_line(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'val'; there is train, validation"):
        HuggingFaceDataset(root, "val")
    with pytest.raises(
        DataError, match=r"no column 'mask'; it has image, label, number; .*data\.l"
    ):
        HuggingFaceDataset(root, label="mask")
    with pytest.raises(DataError, match="no such folder"):
        HuggingFaceDataset(tmp_path / "nothing")
    with pytest.raises(DataError, match="not a folder that save_to_disk wrote"):
        HuggingFaceDataset(tmp_path)
    arrow = next((root / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match="not a folder that save_to_disk wrote"):
        HuggingFaceDataset(root)


def test_data_check(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "check", "huggingface", str(root), "--quiet", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "splits   train 4, validation 2" in printed and "no problems" in printed
    assert cli.main([*command, "--set", "label=number"]) == 2
    assert "train/000000 (number): not an image" in capsys.readouterr().err
    (root / "classes.txt").write_text("a\nb\n")
    assert cli.main(command) == 2
    assert "--reduce-labels with data check" in capsys.readouterr().err
    for more in (["--reduce-labels"], ["--set", "reduce_labels=true"]):
        assert cli.main([*command, *more]) == 0
        assert "classes  2\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_training_and_evaluation(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = (
        "model.backbone=test_resnet", "model.options.feats_channels=8", "workers=2",
        "model.options.transform_channels=8", "epochs=1", "batch_size=2", "device=cpu",
        "augmentation.crop_size=[16,16]",
    )  # fmt: skip
    arguments = ["--root", str(root), "--out", str(run), "--quiet", "--set", *settings]
    assert cli.main(["train", "huggingface", *arguments]) == 0
    shares = []
    for more in ([], ["--root", str(root)], ["--dataset", "huggingface", "--root", str(root)]):
        capsys.readouterr()
        assert cli.main(["evaluate", str(run), "--cpu", "--quiet", *more]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        shares.append(next(row for row in rows if row[0] == "b")[-1])
    used = np.concatenate([mask(10)[1:].ravel(), mask(11)[1:].ravel()])
    assert shares == [f"{(used == 1).mean():.2%}"] * 3

"""Folders of frames as videos: CamVid's videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.data import CAMVID_CLASSES, ClipDataset, DataError, FolderVideos, video_dataset
from mcibi_fast.data.folder_video import cuts, split_stem, usual_step


def folder(root: Path, stems: list[str]) -> Path:
    for kind, suffix in (("images", ".jpg"), ("labels", ".png")):
        (root / kind / "train").mkdir(parents=True)
        for i, stem in enumerate(stems):
            shape = (8, 12, 3) if kind == "images" else (8, 12)
            Image.fromarray(np.full(shape, i, np.uint8)).save(
                root / kind / "train" / (stem + suffix)
            )
    (root / "classes.txt").write_text("\n".join(f"class {i}" for i in range(len(stems))))
    return root


def test_frames_are_sorted_by_number_and_cut_at_jumps(tmp_path: Path) -> None:
    stems = ["b_2", "b_10", "b_6", "a_x_f100", "a_x_f130", "a_x_f160", "a_x_f900", "a_x_f930"]
    dataset = FolderVideos(folder(tmp_path, stems), "train")
    assert dataset.videos() == ["a_x", "a_x.2", "b"]
    names = [[f["name"] for f in dataset.stream(v)] for v in range(3)]
    assert names == [["a_x_f100", "a_x_f130", "a_x_f160"], ["a_x_f900", "a_x_f930"],
                     ["b_2", "b_6", "b_10"]]  # fmt: skip
    assert [int(dataset.frame(2, i)["label"][0, 0]) for i in range(3)] == [0, 2, 1]
    clip = ClipDataset(dataset, history=2)[4]  # a_x_f930: its past does not reach across the cut
    assert clip["name"] == "a_x_f930"
    assert dataset.past(1, 1, 2) == [0, 0]


def test_masks_are_read_as_in_a_folder(tmp_path: Path) -> None:
    root = folder(tmp_path, ["b_1", "b_2", "b_3"])
    reduced = FolderVideos(root, "train", reduce_labels=True)
    assert [int(reduced.frame(0, i)["label"][0, 0]) for i in range(3)] == [255, 0, 1]
    (root / "classes.txt").unlink()
    Image.new("L", (12, 8), 255).save(root / "labels/train/b_3.png")
    binary = FolderVideos(root, "train", binary=True)
    assert binary.classes == ["background", "foreground"]
    assert [int(binary.frame(0, i)["label"][0, 0]) for i in range(3)] == [0, 1, 1]


def test_numbers() -> None:
    assert split_stem("0016E5_07959") == ("0016E5", 7959)
    assert split_stem("seq_1_f0004") == ("seq_1", 4)
    with pytest.raises(DataError, match="photo: no frame number; name the frames <video>_<number>"):
        split_stem("photo")
    assert usual_step([1, 3, 5, 100]) == 2 and usual_step([4]) == 1
    assert cuts([1, 3, 5, 9, 100, 102]) == [0, 4, 6]  # twice the step is no jump


def test_camvid(camvid: Path) -> None:
    expected = {
        "train": {"0001TP": 62, "0006R0": 101, "0016E5": 204},
        "val": {"0016E5": 101},
        "test": {"0001TP": 62, "Seq05VD": 171},
    }
    for split, videos in expected.items():
        dataset = video_dataset("camvid", camvid, split)
        assert dataset.classes == CAMVID_CLASSES
        counts: dict[str, int] = {}
        for video, name in enumerate(dataset.videos()):
            counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + dataset.frames(video)
        assert counts == videos and len(dataset) == sum(videos.values())
    assert video_dataset("camvid", camvid, "train").videos() == [
        "0001TP", "0006R0", "0016E5", "0016E5.2", "0016E5.3",
    ]  # fmt: skip
    frame = dataset.frame(1, 1)
    assert frame["name"] == "Seq05VD_f00030" and frame["image"].shape == (3, 360, 480)
    with pytest.raises(ValueError, match="no video dataset 'voc'; there are camvid, vspw"):
        video_dataset("voc", camvid, "train")

"""Images a second of one loader process: ``mcibi-fast bench loader [--images DIR] [--quick]``.

A row's run reads ``images`` pairs of a JPEG and a PNG from the disk and makes training samples of
them: random scale 0.5 to 2, crop, flip, photometric distortion with probability 1/2 each,
normalisation. The draws are the same in every run.

torchvision      ``transforms.v2``: decode_image, ScaleJitter, RandomCrop, RandomHorizontalFlip,
                 ColorJitter (one for each property), ToDtype, Normalize
albumentations   cv2, RandomScale, PadIfNeeded, RandomCrop, HorizontalFlip, ColorJitter, Normalize
ours             `FolderDataset` with `TrainTransform`, which also draws crops again in which one
                 class has more than three quarters, as the other two do not

Random samples cannot be compared one by one. So what is compared before anything is timed is the
shapes and the mean and deviation of many samples.

``--images`` takes a folder with images/train and labels/train, such as CamVid's; by default the
pictures are drawn, of CamVid's size and of the size that most of ADE20K has with 512 as its short
side.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.cases import Candidate, Case, Disagreement
from benchmarks.harness import command_line, run_cases
from benchmarks.results import Result, table
from mcibi_fast.data import FolderDataset, TrainTransform
from mcibi_fast.defaults import IMAGENET_MEAN, IMAGENET_STD

SCALE = (0.5, 2.0)
JITTER = {"brightness": 32 / 255, "contrast": 0.5, "saturation": 0.5, "hue": 18 / 360}
CASES = {"camvid": ((360, 480), (360, 480)), "ade20k": ((512, 683), (512, 512))}  # image, crop
CLASSES = 11
SPREAD = 0.15  # how far means may be apart; normalised colours have a deviation of about 1
_images: Path | None = None

Sample = tuple[Tensor, Tensor]
Load = Callable[[int], Sample]


# ---- pictures ----------------------------------------------------------------


def draw_pictures(root: Path, size: tuple[int, int], count: int) -> None:
    """Writes pairs of a noisy JPEG, about as large as a photograph's, and a mask of regions."""
    rng = np.random.default_rng(0)
    height, width = size
    for folder in ("images/train", "labels/train"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        blocks = rng.integers(0, 256, (height // 30, width // 30, 3), dtype=np.uint8)
        smooth = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + rng.normal(0, 6, (height, width, 3))
        picture = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        picture.save(root / f"images/train/{i:03d}.jpg", quality=90)
        regions = rng.integers(0, CLASSES, (height // 30, width // 30), dtype=np.uint8)
        mask = Image.fromarray(regions).resize((width, height), Image.Resampling.NEAREST)
        mask.save(root / f"labels/train/{i:03d}.png")


@functools.cache
def folder_of(name: str, count: int) -> Path:
    """A folder with pictures for the case; a drawn one is removed at the end."""
    if name == "camvid" and _images is not None:
        return _images
    held = tempfile.TemporaryDirectory()
    atexit.register(held.cleanup)
    draw_pictures(Path(held.name), CASES[name][0], count)
    return Path(held.name)


# ---- the pipelines -----------------------------------------------------------


def of_torchvision(dataset: FolderDataset, crop: tuple[int, int]) -> Load:
    from torchvision import io, tv_tensors
    from torchvision.transforms import v2

    height, width = dataset.read(0)[1].shape
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: 255}
    jitter = [v2.RandomApply([v2.ColorJitter(**{k: v})], p=0.5) for k, v in JITTER.items()]
    transform = v2.Compose(
        [
            v2.ScaleJitter((height, width), scale_range=SCALE),
            v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            *jitter,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def load(index: int) -> Sample:
        image, mask = paths(dataset, index)
        if index == 0:
            torch.manual_seed(0)
        sample = transform(
            tv_tensors.Image(io.decode_image(str(image), io.ImageReadMode.RGB)),
            tv_tensors.Mask(io.decode_image(str(mask), io.ImageReadMode.UNCHANGED)),
        )
        return sample[0].contiguous(), sample[1][0].contiguous()

    return load


def of_albumentations(dataset: FolderDataset, crop: tuple[int, int]) -> Load:
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)
    off = dict.fromkeys(JITTER, 0)
    transform = A.Compose(
        [
            A.RandomScale((SCALE[0] - 1, SCALE[1] - 1), p=1),
            A.PadIfNeeded(*crop, fill=0, fill_mask=255),
            A.RandomCrop(*crop),
            A.HorizontalFlip(p=0.5),
            *(A.ColorJitter(**{**off, k: v}, p=0.5) for k, v in JITTER.items()),
            A.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            A.ToTensorV2(),
        ]
    )

    def load(index: int) -> Sample:
        image, mask = paths(dataset, index)
        if index == 0:
            transform.set_random_seed(0)
        colours = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
        made = transform(image=colours, mask=cv2.imread(str(mask), cv2.IMREAD_UNCHANGED))
        return made["image"].contiguous(), made["mask"].contiguous()

    return load


def of_ours(dataset: FolderDataset, crop: tuple[int, int]) -> Load:
    dataset.transform = TrainTransform(crop, mean=dataset.mean, std=dataset.std, scale=SCALE)

    def load(index: int) -> Sample:
        epoch, index = divmod(index, len(dataset))
        dataset.set_epoch(epoch)
        sample = dataset[index]
        return sample["image"], sample["label"]

    return load


def paths(dataset: FolderDataset, index: int) -> tuple[Path, Path]:
    image, mask = dataset.pairs[index % len(dataset)]
    return dataset.root / image, dataset.root / mask


# ---- the benchmark -----------------------------------------------------------


def described(load: Load, count: int) -> list[Tensor]:
    """What pipelines that agree have in common: shapes and dtypes, and how the colours are spread.

    Padding is left out of the latter, because only ours pads with the mean colour.
    """
    sums, squares, pixels = torch.zeros(3), torch.zeros(3), 0
    for index in range(count):
        image, label = load(index)
        colours = image[:, label != 255]
        sums += colours.sum(1)
        squares += colours.square().sum(1)
        pixels += colours.shape[1]
    mean = sums / pixels
    kinds = [float(t.dtype == d) for t, d in ((image, torch.float32), (label, torch.uint8))]
    return [
        torch.tensor([*image.shape, *label.shape, *kinds]),
        torch.cat([mean, (squares / pixels - mean.square()).sqrt()]),
    ]


def case(name: str, count: int, checked: int) -> Case:
    """
    Args:
        name: of `CASES`.
        count: images in a run.
        checked: samples that are compared.
    """
    crop = CASES[name][1]
    loads = {}
    for candidate, make in PIPELINES.items():
        try:
            loads[candidate] = make(FolderDataset(folder_of(name, count), "train"), crop)
        except ImportError as error:
            print(f"{candidate} is left out: {error}")

    def run(load: Load) -> Tensor:
        for index in range(count):
            last = load(index)
        return last[0].new_tensor(last[0].shape)

    for candidate, load in loads.items():
        compare(candidate, described(load, checked), described(loads["ours"], checked))
    output = 5 * count * crop[0] * crop[1] * 3  # uint8 in, float32 out
    return Case(
        "loader",
        {"data": name, "crop": "x".join(map(str, crop)), "images": count},
        torch.float32,
        [Candidate(key, functools.partial(run, load)) for key, load in loads.items()],
        bytes=output,
        flops=0,
    )


def compare(candidate: str, theirs: list[Tensor], ours: list[Tensor]) -> None:
    """Raises Disagreement unless shapes and dtypes are equal, and the colours about as spread."""
    if not torch.equal(theirs[0], ours[0]) or (theirs[1] - ours[1]).abs().max() > SPREAD:
        raise Disagreement(f"{candidate} makes {theirs}, ours {ours}")


PIPELINES = {"torchvision": of_torchvision, "albumentations": of_albumentations, "ours": of_ours}


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    if device == "cpu":
        for name in CASES:
            yield functools.partial(case, name, 4 if quick else 24, 200)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``, with images a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader's process
    try:
        result = run_cases("loader", cases("cpu", quick), "cpu", quick)
    finally:
        torch.set_num_threads(threads)
    for row in result["rows"]:
        row["images_per_s"] = row["images"] / row["fastest_ms"] * 1e3
    print(table([{k: row[k] for k in SHOWN} for row in result["rows"]], 1))
    return [result]


SHOWN = ("data", "crop", "candidate", "images_per_s", "times_ours")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--images", type=Path)
    known, sys.argv[1:] = parser.parse_known_args()
    _images = known.images
    sys.exit(command_line(run, __doc__.splitlines()[0]))

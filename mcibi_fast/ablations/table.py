"""The parts of an ablation table: columns, rows and the table itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SCENES = "scenes"
VIDEOS = ("moving_scenes", "camvid_video", "vspw")

Scores = dict[str, float]
"""Measured values by the score name of a `Column`; a score that does not exist is left out."""

Measure = Callable[[Any], dict[str, Scores]]
"""A function that takes a `runs.TrainedRun` and returns scores by part; each of several rows may
show one part of the same measurement."""


@dataclass(frozen=True)
class Column:
    """A measured column.

    Attributes:
        score: its name in `Scores`.
        heading: its heading in the printed table.
        digits: number of digits after the decimal point.
    """

    score: str
    heading: str
    digits: int = 2


MEAN_IOU = Column("mIoU", "mIoU")
PIXEL_ACCURACY = Column("pixel_accuracy", "pixel accuracy")
SECONDS = Column("seconds", "seconds", digits=0)


@dataclass(frozen=True)
class Row:
    """A row: how it is trained, how it is measured, and what the paper prints.

    Attributes:
        name: the row's name, unique in its table.
        settings: what it changes in the base configuration, as ``--set`` takes it; rows with equal
            settings share their trained model.
        paper: the numbers that the paper prints, one for each of `Table.paper`; None if it prints
            none.
        measure: the measurement; None takes the scores of the training's last evaluation.
        part: which part of the measurement this row shows, such as "inference.stages=2".
        versus: the row that it is compared with; None means the first row of the table.
    """

    name: str
    settings: tuple[str, ...] = ()
    paper: tuple[float | None, ...] = ()
    measure: Measure | None = None
    part: str = ""
    versus: str | None = None

    def difference(self) -> str:
        """What the row changes in the base, as text."""
        changes = [*self.settings, *([self.part] if self.part else [])]
        return "; ".join(changes) or "the base"


@dataclass(frozen=True)
class Table:
    """A table of the paper, or an ablation that its text describes.

    Attributes:
        title: what is compared.
        source: the paper's table or section, and what its numbers were measured on.
        paper: headings of the columns that the paper prints; rows are compared in the first.
        rows: the rows in the paper's order.
        model: the model of the base configuration.
        columns: what is measured; rows are compared in the first.
        note: what a reader has to know about the rows.
        data: the only dataset on which it can be measured; None means any.
        videos: whether it needs a dataset of videos (one of `VIDEOS`; the first is the default).
        base: changes to the recipe, by the dataset's name.
        test_data: a second dataset on which the models are tested.
    """

    title: str
    source: str
    paper: tuple[str, ...]
    rows: tuple[Row, ...]
    model: str = "fcn_mcibipp"
    columns: tuple[Column, ...] = (MEAN_IOU, PIXEL_ACCURACY, SECONDS)
    note: str = ""
    data: str | None = None
    videos: bool = False
    base: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    test_data: str | None = None

    @property
    def default_data(self) -> str:
        """The dataset that is used if none is named."""
        return VIDEOS[0] if self.videos else SCENES

    def versus(self, row: Row) -> str:
        """The name of the row that this one is compared with; for the first row its own name."""
        return row.versus or self.rows[0].name

    def varied(self) -> set[str]:
        """The fields that the rows change, in training or in testing."""
        return {s.partition("=")[0] for row in self.rows for s in (*row.settings, row.part)}

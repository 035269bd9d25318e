"""The tables: what their rows train, and what the paper prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from mcibi_fast.ablations import configure
from mcibi_fast.ablations.paper import TABLES
from mcibi_fast.ablations.table import Row, Table
from mcibi_fast.models import Segmentor
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec
from mcibi_fast.nn.context import Add, Concatenation, WeightedAdd
from mcibi_fast.nn.diagonal_memory import DiagonalMemory
from mcibi_fast.nn.learnt_memory import LearntMemory
from mcibi_fast.nn.memory import GaussianMemory
from mcibi_fast.nn.representation_memory import RepresentationMemory
from mcibi_fast.recipes import TrainConfig

VIDEO = ("16", "17")
SMALL = ("model.options.feats_channels=16", "model.options.transform_channels=8")


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def base(table: Table, *settings: str) -> TrainConfig:
    """The table's base on built-in scenes, whatever data it is about."""
    anywhere = replace(table, data=None)
    return configure.base_config(anywhere, table.default_data, None, [*SMALL, *settings])


def build(config: TrainConfig) -> Segmentor:
    model = config.model
    classes = [f"class {k}" for k in range(5)]
    spec = ModelSpec(model.name, model.backbone, model.options, classes, [], [], [])
    return create_model(spec)


def head(name: str, row: str, *settings: str) -> torch.nn.Module:
    table = TABLES[name]
    (chosen,) = configure.select_rows(table, row)
    return build(configure.row_config(base(table, *settings), chosen, seed=0)).head


@pytest.mark.parametrize("name", TABLES)
def test_every_row_trains_a_model_of_its_own_kind(name: str) -> None:
    table = TABLES[name]
    shared = base(table)
    built: dict[tuple[str, ...], TrainConfig] = {}
    for row in table.rows:
        config = configure.row_config(shared, row, seed=3)
        if row.settings not in built:
            build(config)
            assert all(config.to_dict() != other.to_dict() for other in built.values()), row
        built[row.settings] = config
        # But for the model and the augmentation all is the base's.
        mine, theirs = config.to_dict(), shared.to_dict()
        assert mine.pop("seed") == 3 and theirs.pop("seed") == 0
        varied = {s.partition(".")[0] for r in table.rows for s in r.settings}
        for part in varied:
            mine.pop(part), theirs.pop(part)
        assert mine == theirs


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_well_formed(name: str) -> None:
    table = TABLES[name]
    names = [row.name for row in table.rows]
    assert len(set(names)) == len(names) and not any("," in n for n in names)
    for row in table.rows:
        assert not row.paper or len(row.paper) == len(table.paper)
        assert table.versus(row) in names
        assert row.measure is None or row.part
    runs = [configure.run_name(base(table), row, 0) for row in table.rows]
    assert len(set(runs)) == len({row.settings for row in table.rows})


def test_momentum_and_alpha_are_their_rows_names() -> None:
    for row in TABLES["4"].rows:
        memory = head("4", row.name).memory
        assert isinstance(memory, GaussianMemory)
        assert memory.momentum == float(row.name.removesuffix("-Poly"))
        assert (memory.momentum_schedule == "poly") is row.name.endswith("Poly")
    for row in TABLES["5"].rows:
        assert head("5", row.name).alpha == float(row.name)


def test_fusions_are_their_rows_names() -> None:
    fusions = {"add": Add, "weighted add": WeightedAdd, "concatenation": Concatenation}
    for row, fusion in fusions.items():
        assert type(head("2", row).context.fuse) is fusion
    assert not hasattr(head("2", "FCN"), "context")


def test_memories_are_their_rows_names() -> None:
    memories = [head("3", row.name).memory for row in TABLES["3"].rows[1:]]
    kinds = [RepresentationMemory, RepresentationMemory, GaussianMemory, GaussianMemory]
    assert [type(memory) for memory in memories] == kinds
    assert [memory.fixed for memory in memories] == [True, False, False, False]
    for row in TABLES["init"].rows:
        assert head("init", row.name).memory.init == row.name
    for row in TABLES["weights"].rows:
        assert head("weights", row.name).weights_from == row.name
    assert head("1", "FCN+GT-MCIBI++").needs_labels
    assert not head("1", "FCN+MCIBI++ tested with GT").needs_labels


def test_codes_are_their_rows_names() -> None:
    names = ("random", "learnt", "mean and deviation", "per channel")
    memories = [head("codes", name).memory for name in names]
    kinds = [GaussianMemory, LearntMemory, GaussianMemory, DiagonalMemory]
    assert [type(memory) for memory in memories] == kinds
    assert [memory.fixed for memory in memories] == [True, False, False, False]
    # Random codes are what the memory draws with mean 0 and deviation 1.
    assert torch.equal(memories[0].representations(), memories[0].noise_table)


def test_controls_of_the_head_are_their_rows_names() -> None:
    plain = [head("head", name) for name in ("FCN", "FCN of two convolutions")]
    convolutions = [sum(isinstance(m, nn.Conv2d) for m in h.decoder.modules()) for h in plain]
    assert convolutions == [2, 3]  # the last one classifies
    names = ("FCN+MCIBI++", "W detached", "linear projections")
    contexts = [head("head", name).context for name in names]
    assert [context.detach_weights for context in contexts] == [False, True, False]
    assert [context.attention.linear for context in contexts] == [False, False, True]


def test_augmentations_are_their_rows_names() -> None:
    table = TABLES["augmentation"]
    configs = [configure.row_config(base(table), row, 0) for row in table.rows]
    assert [c.augmentation.style_mixing > 0 for c in configs] == [False, True, False]
    assert [c.adversarial.probability > 0 for c in configs] == [False, False, True]


def test_fcn_does_without_the_options_of_a_memory() -> None:
    table = TABLES["2"]
    settings = ("model.options.form=paper", "model.options.dropout=0.3", "model.options.hard=true")
    shared = base(table, *settings)
    fcn = configure.row_config(shared, table.rows[0], seed=0)
    assert fcn.model.name == "fcn" and fcn.model.options == {"feats_channels": 16, "dropout": 0.3}
    assert head("2", "FCN", *settings).decoder.conv[0].out_channels == 16
    assert head("2", "add", *settings).context.fuse is not None
    assert shared.model.options["form"] == "paper", "the base was changed"


def test_an_unknown_option_stays_with_all_rows_and_is_an_error() -> None:
    table = TABLES["2"]
    configs = [
        configure.row_config(base(table, "model.options.wdth=3"), row, 0) for row in table.rows
    ]
    for config in configs:
        with pytest.raises(ValueError, match="wdth"):
            build(config)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("2", "model.options.fusion=add"),
        ("4", "model.options.momentum=0.3"),
        ("9", "model.name=x"),
        ("6", "inference.stages=2"),
    ],
)
def test_a_field_that_the_rows_vary_cannot_be_set(name: str, settings: str) -> None:
    with pytest.raises(
        ValueError, match=f"--set {settings.split('=')[0]}: cannot be set, as the rows"
    ):
        configure.base_config(TABLES[name], "scenes", None, [settings])


def test_another_framework_may_be_the_base() -> None:
    shared = base(TABLES["4"], "model.name=pspnet_mcibipp")
    assert shared.model.name == "pspnet_mcibipp"
    assert (
        configure.run_name(shared, TABLES["4"].rows[0], 1) == "pspnet_mcibipp-momentum=0.01-seed1"
    )


def test_video_rows_read_as_many_past_frames_as_their_models_take() -> None:
    histories = []
    for row in TABLES["16"].rows[1:]:
        config = configure.row_config(base(TABLES["16"]), row, 0)
        fuse = build(config).head.context.fuse
        assert fuse.history == config.data.history
        histories.append((fuse.history, fuse.past))
    assert histories == [(h, past) for h in (1, 2, 3) for past in ("features", "context")]
    # Tables share the image model, and the video model with the defaults.
    runs = {t: {configure.run_name(base(TABLES[t]), r, 0) for r in TABLES[t].rows} for t in VIDEO}
    shared = "upernet_video_mcibipp-history=2-past=context-seed0"
    assert runs["16"] & runs["17"] == {"upernet_mcibipp-seed0", shared}


def test_table_17_gives_each_model_the_options_that_it_has() -> None:
    configs = [
        configure.row_config(base(TABLES["17"], "model.options.unbiased=true"), row, 0)
        for row in TABLES["17"].rows
    ]
    having = [c.model.name for c in configs if "unbiased" in c.model.options]
    assert having == ["upernet_mcibipp", "upernet_video_mcibipp"] and len(configs) == 15
    flow = [
        configure.row_config(base(TABLES["17"], "model.options.flow=raft"), row, 0).model
        for row in TABLES["17"].rows
    ]
    taking = [model.name for model in flow if "flow" in model.options]
    assert taking == ["pspnet_etc", "pspnet_netwarp", "ocrnet_etc", "ocrnet_netwarp"]


def names(rows: list[Row]) -> list[str]:
    return [row.name for row in rows]


def test_rows_are_chosen_by_name_or_number() -> None:
    table = TABLES["2"]
    assert names(configure.select_rows(table, None)) == names(list(table.rows))
    assert names(configure.select_rows(table, "weighted add, 1")) == ["FCN", "weighted add"]
    assert names(configure.select_rows(table, "CONCATENATION")) == ["concatenation"]
    with pytest.raises(ValueError, match="no row 'sum'; there are 1 FCN, 2 add"):
        configure.select_rows(table, "sum")


def test_printed_numbers_agree_with_the_differences_that_the_paper_prints() -> None:
    """Tables 8 and 9 print gains beside their numbers; section 4.2 prints others."""
    gains = [
        round(row.paper[i] - before.paper[i], 2)
        for before, row in zip(TABLES["9"].rows[::2], TABLES["9"].rows[1::2], strict=True)
        for i in range(4)
    ]
    assert gains == [
        6.43, 3.61, 2.50, 5.62,
        1.25, 0.86, 0.99, 1.07,
        1.28, 0.97, 0.97, 1.55,
        1.66, 1.10, 1.24, 1.31,
        1.11, 1.17, 0.92, 1.27,
    ]  # fmt: skip
    printed = {row.name: row.paper[0] for row in TABLES["8"].rows}
    versus = {row.name: TABLES["8"].versus(row) for row in TABLES["8"].rows}
    ours = [name for name in printed if "MCIBI" in name]
    assert [round(printed[n] - printed[versus[n]], 2) for n in ours] == [2.50, 0.37, 0.97, 0.90]
    fusion = [row.paper[0] for row in TABLES["2"].rows]
    assert [round(value - fusion[0], 2) for value in fusion[1:]] == [4.19, 5.10, 6.43]
    # Section 5.2 prints what C_bi gains over R, 5.3 what a video model gains over its image model.
    ablation = [row.paper[0] for row in TABLES["16"].rows]
    over_features = [b - a for a, b in zip(ablation[1::2], ablation[2::2], strict=True)]
    assert [round(gain, 2) for gain in over_features] == [0.52, 0.54, 1.33]
    upernet, mcibi, ours, video_mcibi, video_ours = (
        row.paper for row in TABLES["17"].rows if row.name.startswith("UperNet")
    )
    large = [round(b - a, 2) for a, b in zip(ours[6:], video_ours[6:], strict=True)]
    assert (large[0], large[3], large[4]) == (2.84, 4.81, 1.46)
    large = [round(b - a, 2) for a, b in zip(mcibi[6:], video_mcibi[6:], strict=True)]
    assert (large[0], large[3], large[4]) == (2.39, 5.15, 1.15)
    # Beside the rows of MCIBI++ the table prints their gains over those of MCIBI.
    gains = [round(b - a, 2) for a, b in zip(mcibi, ours, strict=True)]
    assert gains == [1.10, 1.30, 2.22, 1.91, 1.51, 1.96, 0.86, 0.48, 0.78, 0.65, 0.55, 0.88]
    gains = [round(b - a, 2) for a, b in zip(video_mcibi[6:], video_ours[6:], strict=True)]
    assert gains == [1.31, 0.23, 0.42, 0.31, 0.86, 1.11]
    assert round(ours[3] - upernet[3], 2) == 6.96 and round(ours[4] - upernet[4], 2) == 1.07
    memory = [row.paper[0] for row in TABLES["3"].rows]
    assert [round(memory[3] - memory[i], 2) for i in (0, 2)] == [6.43, 1.21]
    assert round(memory[4] - memory[3], 2) == 0.35
    for name, row in (
        ("1", "FCN+MCIBI++"),
        ("2", "concatenation"),
        ("3", "Memory-D updated"),
        ("4", "0.1"),
        ("5", "0.4"),
        ("6", "1 stage"),
        ("9", "FCN+MCIBI++"),
    ):
        (chosen,) = configure.select_rows(TABLES[name], row)
        assert chosen.paper[0] == 43.39 and chosen.settings == ()

"""Tables 10 to 15 and the image models of Table 17: their rows, models and printed numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mcibi_fast import cli, models
from mcibi_fast.ablations import configure
from mcibi_fast.ablations.paper import TABLES
from mcibi_fast.models.outline import outline
from tests.ablations.command import arguments, results

NAMES = ("10", "11", "12", "13", "14", "15")


def printed(table: str) -> dict[str, dict[str, float]]:
    """The paper's numbers, by row and column; rows without any are left out."""
    heads = [head.removeprefix("mIoU ") for head in TABLES[table].paper]
    return {
        row.name: {h: v for h, v in zip(heads, row.paper, strict=True) if v is not None}
        for row in TABLES[table].rows
        if row.paper
    }


# The paper's numbers of all rows with a memory, the first and the last method without one, and how
# many numbers the table has of the methods that are here.
CELLS = {
    "10": (
        23,
        {
            "CCNet": {"ResNet-101": 45.76},
            "PSPNet": {"ResNet-101": 43.29, "ResNet-269": 44.94},
            "DeepLabV3": {"ResNeSt-101": 46.91, "ResNeSt-200": 48.36},
            "SETR-MLA": {"ViT-Large": 50.28},
            "DeepLabV3+MCIBI": {"ResNet-101": 47.22, "ResNeSt-101": 47.36, "ViT-Large": 50.80},
            "UperNet+MCIBI++": {"ResNet-101": 47.93, "ResNeSt-101": 48.56, "Swin-Large": 54.52},
        },
    ),
    "11": (
        13,
        {
            "CE2P": {"ResNet-101": 53.10},
            "ISNet": {"ResNet-101": 55.41, "ResNeSt-101": 56.81},
            "DeepLabV3+MCIBI": {"ResNet-101": 55.42, "ResNeSt-101": 56.34, "HRNetV2-W48": 56.99},
            "UperNet+MCIBI++": {"ResNet-101": 56.32, "ResNeSt-101": 57.08, "Swin-Large": 59.91},
        },
    ),
    "12": (
        13,
        {
            "DANet": {"ResNet-101": 39.70},
            "MaskFormer": {"ResNet-101": 39.30},
            "DeepLabV3+MCIBI": {"ResNet-101": 41.49, "ResNeSt-101": 42.15, "ViT-Large": 44.89},
            "UperNet+MCIBI++": {"ResNet-101": 41.84, "ResNeSt-101": 42.71, "Swin-Large": 50.27},
        },
    ),
    "13": (
        13,
        {
            "CCNet": {"ResNet-101": 81.90},
            "ANNet": {"ResNet-101": 81.30},
            "DeepLabV3+MCIBI": {"ResNet-101": 82.03, "ResNeSt-101": 81.59, "HRNetV2-W48": 82.55},
            "DeepLabV3+MCIBI++": {"ResNet-101": 82.20, "ResNeSt-101": 81.70, "HRNetV2-W48": 82.74},
        },
    ),
    "14": (
        10,
        {
            "EncNet": {"ResNet-101": 51.70},
            "OCRNet": {"ResNet-101": 54.80, "HRNetV2-W48": 56.20},
            "UperNet+MCIBI++": {"ResNet-101": 56.82, "ResNeSt-101": 57.92, "Swin-Large": 64.01},
        },
    ),
    "15": (
        24,
        {
            "FCN": {"ResNet-101": 70.59},
            "OCRNet": {"ResNet-101": 78.82, "HRNetV2-W48": 77.60},
            "DNLNet": {"ResNet-101": 78.37},
            "UperNet+MCIBI++": {"ResNet-50": 79.48, "ResNet-101": 80.42},
        },
    ),
}


@pytest.mark.parametrize("table", NAMES)
def test_printed_numbers_are_those_of_the_paper(table: str) -> None:
    count, cells = CELLS[table]
    found = printed(table)
    assert {name: found[name] for name in cells} == cells
    assert sum(map(len, found.values())) == count
    assert {name for name in found if "MCIBI" in name} <= cells.keys()


def test_differences_that_the_text_prints() -> None:
    """Sections 4.4 and 4.5 compare some of the numbers."""
    ade, stuff, lip = printed("10"), printed("12"), printed("11")
    ours = ade["UperNet+MCIBI++"]["ResNet-101"]
    others = [ade[name]["ResNeSt-101"] for name in ("ISNet", "DeepLabV3", "DeepLabV3+MCIBI")]
    assert [round(ours - other, 2) for other in others] == [0.38, 1.02, 0.57]
    assert round(lip["UperNet+MCIBI++"]["ResNet-101"] - lip["OCRNet"]["ResNet-101"], 2) == 0.72
    assert round(stuff["UperNet+MCIBI++"]["ResNet-101"] - stuff["ISNet"]["ResNet-101"], 2) == 0.24
    cityscapes, context = printed("13"), printed("14")
    memories = [cityscapes[f"DeepLabV3+{m}"] for m in ("MCIBI", "MCIBI++")]
    gains = [round(memories[1][b] - memories[0][b], 2) for b in ("ResNet-101", "HRNetV2-W48")]
    assert gains == [0.17, 0.19]
    ours = context["UperNet+MCIBI++"]["ResNet-101"]
    assert round(ours - context["OCRNet"]["HRNetV2-W48"], 2) == 0.62


def test_image_models_of_table_17() -> None:
    found = {row.name: row.paper for row in TABLES["17"].rows}
    none = (None,) * 6
    assert found["DeepLabV3Plus"] == (34.67, None, None, 65.45, 83.24, 78.24, *none)
    assert found["PSPNet"] == (36.47, None, None, 65.89, 84.16, 79.63, *none)
    assert found["OCRNet"] == (36.68, None, None, 66.21, 83.97, 79.04, *none)
    for name in ("ETC", "NetWarp", "TCB"):
        assert name in TABLES["17"].note
    assert found["NetWarp+PSPNet"] == (36.95, None, None, 67.85, 84.36, 79.42, *none)
    assert found["ETC+OCRNet"] == (37.46, None, None, 68.99, 84.10, 79.10, *none)
    assert found["TCB_st-ocr-mem"] == (37.82, None, None, 73.63, 87.86, 83.99, *none)
    assert all(len(numbers) == 12 for numbers in found.values())


def test_every_row_is_compared_with_its_framework_or_with_the_first_row() -> None:
    for name in NAMES:
        for row in TABLES[name].rows:
            expected = row.name.partition("+")[0] if "MCIBI" in row.name else None
            assert TABLES[name].versus(row) == (expected or TABLES[name].rows[0].name)
    assert len(TABLES["15"].rows) == 22


def test_every_model_builds_in_full_size() -> None:
    """Without memory: on the meta device."""
    rows = [row for name in (*NAMES, "17") for row in TABLES[name].rows]
    kinds = {s.partition("=")[2] for row in rows for s in row.settings if "model.name" in s}
    assert kinds >= set(models.frameworks()) and len(kinds) == 36
    sizes = {}
    for kind in kinds:
        model = outline(lambda kind=kind: models.create(kind, 21, "resnet18"), 10**6)
        assert all(parameter.is_meta for parameter in model.parameters())
        sizes[kind] = sum(parameter.numel() for parameter in model.parameters())
    assert TABLES["15"].rows[0].settings[1:] == ("model.options.convs=2",)  # as in the package
    assert sizes["fcn"] < sizes["upernet"] < sizes["upernet_mcibi"]


@pytest.mark.parametrize("name", NAMES)
def test_the_base_on_the_papers_dataset(name: str, tmp_path: Path) -> None:
    """The backbone of most rows; several scales but in Tables 11 and 15."""
    for data in TABLES[name].base:
        config = configure.base_config(TABLES[name], data, str(tmp_path), [])
        assert config.model.backbone == "resnet101"
        assert (len(config.inference.scales) == 6) is (name not in ("11", "15"))
        assert config.inference.flip is (name != "15")


@pytest.mark.slow
def test_table_15_on_the_built_in_scenes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: list[str]
) -> None:
    rows = "FCN,PointRend,OCRNet,UperNet,UperNet+MCIBI++"
    assert cli.main(arguments("15", tmp_path, "--rows", rows)) == 0
    kinds = ["fcn-convs=2", "pointrend", "ocrnet", "upernet", "upernet_mcibipp"]
    assert trained == [f"{kind}-seed0" for kind in kinds]
    shown = re.sub(" +", " ", capsys.readouterr().out)
    assert "| PointRend | 72.31 | - | - | +1.72 |" in shown
    assert "| UperNet+MCIBI++ | 80.42 | - | 79.48 | +1.29 |" in shown
    found = results(tmp_path, "15")["rows"]
    assert found[-1]["versus"] == "UperNet" and len(found[-1]["differences"]) == 1
    assert all(0 <= row["mean"]["mIoU"] <= 100 for row in found)

"""The measured numbers beside the paper's."""

from __future__ import annotations

from mcibi_fast.ablations.paper import TABLES
from mcibi_fast.ablations.results import as_data, differences, markdown, mean_and_spread

SCORES = [
    {"mIoU": 40.0, "pixel_accuracy": 80.0, "seconds": 60.0},
    {"mIoU": 42.0, "pixel_accuracy": 82.0, "seconds": 61.0},
]
MEASURED = {
    "FCN": {0: SCORES[0], 1: SCORES[1]},
    "add": {0: SCORES[1], 1: SCORES[1]},
    "weighted add": {1: SCORES[0]},
}
TABLE = TABLES["2"]
ROWS = list(TABLE.rows)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_mean_and_spread() -> None:
    assert mean_and_spread([]) == "-"
    assert mean_and_spread([1.0]) == "1.00"
    assert mean_and_spread([1.0], signed=True) == "+1.00"
    assert mean_and_spread([-1.0, -3.0], 1, signed=True) == "-2.0 ± 1.4"


def test_differences_are_between_equal_seeds() -> None:
    assert differences(TABLE, ROWS[0], MEASURED) == []
    assert differences(TABLE, ROWS[1], MEASURED) == [2.0, 0.0]
    assert differences(TABLE, ROWS[2], MEASURED) == [-2.0]
    assert differences(TABLE, ROWS[3], MEASURED) == []


def test_markdown() -> None:
    lines = markdown(TABLE, ROWS, MEASURED).splitlines()
    assert len({len(line) for line in lines}) == 1, "aligned"
    assert cells(lines[0]) == ["row", "paper mIoU", "Δ", "mIoU", "Δ", "pixel accuracy", "seconds"]
    fcn, add, weighted, concatenation = map(cells, lines[2:])
    assert fcn == ["FCN", "36.96", "-", "41.00 ± 1.41", "-", "81.00 ± 1.41", "60 ± 1"]
    assert add[:5] == ["add", "41.15", "+4.19", "42.00 ± 0.00", "+1.00 ± 1.41"]
    assert weighted[3:] == ["40.00", "-2.00", "80.00", "60"]
    assert concatenation == ["concatenation", "43.39", "+6.43", "-", "-", "-", "-"]


def test_columns_of_table_6_have_their_digits() -> None:
    table = TABLES["6"]
    two = {"mIoU": 50.0, "ms": 12.345, "trade_off": 0.0244, "W_mIoU": 1.0, "W_pixel_accuracy": 2.0}
    lines = markdown(table, list(table.rows), {"2 stages": {0: two}}).splitlines()
    assert cells(lines[3]) == [
        "2 stages", "43.74", "49.33", "0.024", "40.89", "79.40", "+0.35",
        "50.00", "-", "12.35", "0.024", "1.00", "2.00",
    ]  # fmt: skip


def test_printed_differences_are_in_the_first_column_that_both_rows_have() -> None:
    table = TABLES["17"]
    lines = markdown(table, list(table.rows), {}).splitlines()
    printed = len(table.paper) + 1
    images = ["-1.79", "-", "+0.01", "+0.22", "+5.65", "+6.75"]  # UperNet is the second
    found = [cells(line)[printed] for line in lines[2:]]
    peers = ["+0.08", "+0.48", "+0.78", "+0.84", "+0.99", "+0.72", "+1.14"]  # to PSPNet, OCRNet
    assert found == [*images, *peers, "+2.39", "+2.84"]


def test_data_is_what_the_table_shows() -> None:
    fcn, add, weighted, concatenation = as_data(TABLE, ROWS, MEASURED)
    assert fcn["paper"] == {"mIoU": 36.96} and fcn["settings"] == ["model.name=fcn"]
    assert fcn["mean"]["mIoU"] == 41.0 and fcn["seeds"]["1"] == SCORES[1]
    assert add["differences"] == [2.0, 0.0] and add["versus"] == "FCN"
    assert weighted["std"] == {} and concatenation["mean"] == {}

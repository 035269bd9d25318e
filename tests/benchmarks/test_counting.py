"""The counting rule, and every figure that the paper's Table 7 prints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import cases, table7_contexts
from benchmarks.cases import Disagreement
from benchmarks.results import read, write
from benchmarks.table7_contexts import ROWS
from mcibi_fast import ops
from mcibi_fast.models.counting import count

# Parameters in M and multiply-adds in G as printed in Table 7, and the true multiply-adds in G.
# The last row is no row of the paper: it is what the released checkpoints have.
TABLE_7 = {
    "ASPP": (42.21, 674.47, 674.3),
    "PPM": (23.07, 309.45, 309.3),
    "CCNet": (23.92, 397.38, 402.1),
    "DANet": (23.92, 392.02, 555.1),
    "ANN": (20.32, 335.24, 336.9),
    "DNL": (24.12, 395.25, 532.6),
    "APCNet": (30.46, 413.12, 413.2),
    "DCA, MCIBI": (14.82, 242.80, 381.4),
    "ASPP+DCA, MCIBI": (45.63, 730.56, 1006.3),
    "DCA, MCIBI++": (14.82, 242.80, 381.4),
    "ASPP+DCA, MCIBI++": (45.63, 730.56, 1006.3),
    "ASPP+DCA, released": (57.03, 917.27, 1055.7),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_table_7(row):
    parameters, printed, true = row.counts()
    assert (round(parameters / 1e6, 2), round(printed / 1e9, 2), round(true / 1e9, 1)) == TABLE_7[
        row.name
    ]
    if row.name != "ASPP+DCA, released":
        assert row.paper[:2] == TABLE_7[row.name][:2]


def test_every_row_is_there():
    assert {row.name for row in ROWS} == set(TABLE_7)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_rule(device):
    module = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=True),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Conv2d(6, 5, 1, bias=False),
    )
    module = module.to(device).eval()
    counts = count(module, torch.zeros(2, 4, 7, 9, device=device))
    pixels = 2 * 7 * 9
    first, last = pixels * 6 * (2 * 9), 2 * 2 * 2 * 5 * 6
    assert counts.parameters == 6 * 2 * 9 + 6 + 2 * 6 + 6 * 5
    assert counts.printed == first + pixels * 6 * (1 + 2 + 1 + 1) + last
    assert counts.true == first + last
    again = count(module, torch.zeros(2, 4, 7, 9, device=device), repeated=[module[4]])
    assert again == (counts.parameters, counts.printed + last, counts.true + last)
    assert not any(m._forward_hooks for m in module.modules())


class Products(nn.Module):
    """A matrix product, the ops of this package, and nothing that the printed rule counts."""

    def forward(self, query, key, value, logits):
        attended = ops.confidence_attention(query, key, value) @ query.mT  # (2, 6, 6)
        noise = logits.new_ones(3, 4)
        gathered = ops.gaussian_aggregate(logits, logits.new_ones(3, 2), 4, noise=noise)
        weights = logits.flatten(2).mT  # (2, 7, 3)
        return attended, gathered, ops.class_rank_attention(weights, weights, scale=1.0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_matrix_products_are_in_the_true_count_alone(device):
    shapes = [(2, 6, 8), (2, 5, 8), (2, 5, 8), (2, 3, 1, 7)]
    counts = count(Products(), *(torch.ones(shape, device=device) for shape in shapes))
    attention, product = 2 * 6 * 5 * (8 + 8), 2 * 6 * 6 * 8
    gather, class_rank = 2 * 7 * 3 * 4, 2 * 7 * 7 * (3 + 3)
    assert counts == (0, 0, attention + product + gather + class_rank)


@pytest.fixture
def small(monkeypatch):
    """The benchmark with few channels and classes."""
    for name, value in {"CHANNELS": 16, "Z": 8, "K": 5}.items():
        monkeypatch.setattr(table7_contexts, name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_benchmark_measures_and_writes(tmp_path, capsys):
    contexts, updates = table7_contexts.run("cpu", size=7, update_size=8, budget=0.1)
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in ROWS)
    assert [row["context"] for row in contexts["rows"]] == [row.name for row in ROWS]
    assert all(row["median_ms"] > 0 for row in contexts["rows"] + updates["rows"])
    sizes = {row["memory"]: row["memory_bytes"] for row in updates["rows"]}
    assert sizes == {"MCIBI++": 4 * 5 * 2, "MCIBI, mean": 4 * 5 * 8, "MCIBI, cosine": 4 * 5 * 8}
    for result in (contexts, updates):
        write(result, tmp_path)
    assert read(tmp_path) == [contexts, updates]
    assert len(list(tmp_path.glob("table7_contexts-*.json"))) == 1


@pytest.mark.usefixtures("small")
def test_the_benchmark_refuses_results_that_disagree(monkeypatch):
    row = ROWS[0]
    wrong = row.make().eval()
    monkeypatch.setattr(cases.copy, "deepcopy", lambda module: row.make().eval())
    with pytest.raises(Disagreement, match="ASPP: map 9"):
        table7_contexts.agreement(row, wrong, "cpu")
    monkeypatch.setattr(
        table7_contexts, "released_statistics", lambda memory, *_: torch.zeros_like(memory)
    )
    with pytest.raises(Disagreement, match=r"MCIBI\+\+"):
        table7_contexts.measure_updates(8, "cpu", 0.1)

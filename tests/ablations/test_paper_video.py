"""Tables 16 and 17 end to end, and what cannot be made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mcibi_fast import cli
from mcibi_fast.ablations import configure, runs
from mcibi_fast.ablations import paper_video as videos
from mcibi_fast.ablations.paper import TABLES
from mcibi_fast.inference import evaluate_video as engine_video
from mcibi_fast.inference.evaluate_video import evaluate_videos
from mcibi_fast.metrics import DISFlow, VideoMetrics
from tests.ablations.command import TINY, results, trained_run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "rows"), [("16", "1,4,5"), ("17", "UperNet,UperNet+MCIBI,UperNet+Video-MCIBI")]
)
def test_tables_of_videos(
    table: str,
    rows: str,
    tmp_path: Path,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = [*TINY, "data.train_count=8", "data.val_count=2", "data.size=[32,40]"]
    settings += ["data.length=10", "model.options.auxiliary_weight=0"]
    command = ["ablate", table, "--out", str(tmp_path), "--quiet", "--rows", rows]
    assert cli.main([*command, "--set", *settings]) == 0
    kinds = {"16": ["upernet_mcibipp", "upernet_video_mcibipp-history=2-past=features"]}
    kinds["16"] += ["upernet_video_mcibipp-history=2-past=context"]
    kinds["17"] = ["upernet", "upernet_mcibi", "upernet_video_mcibi-history=2-past=context"]
    assert trained == [f"{kind}-seed0" for kind in kinds[table]]
    found = results(tmp_path, table)["rows"]
    assert len(found) == 3
    for row in found:
        scores = row["mean"]
        assert {"mIoU", "TC", "VC_8"} <= scores.keys()
        assert "VC_16" not in scores, "videos of 10 frames have no window of 16"
        assert all(0 <= scores[name] <= 100 for name in scores.keys() - {"seconds"})
    printed = capsys.readouterr().out
    assert printed.count("Protocol vspw2021; TC: 18 pairs of frames, flow: exact") == 1
    assert "VC_8: 4 windows, 0 empty; VC_16: 0 windows" in printed

    # The scores are those of the model over the videos; they are measured once.
    folder = tmp_path / trained[-1]
    run = trained_run(folder)
    found = evaluate_videos(run.model(), run.validation(), flow="given").compute()
    mine = results(tmp_path, table)["rows"][-1]["mean"]
    assert mine["TC"] == 100 * found.tc.score and mine["mIoU"] == 100 * found.mean_iou
    monkeypatch.setattr(videos, "evaluate_videos", None)
    assert cli.main([*command, "--set", *settings]) == 0
    assert "\nProtocol vspw2021; TC: 18 pairs of frames, flow: exact" in capsys.readouterr().out

    # Rows that were measured otherwise are named.
    file = folder / runs.MEASURED
    file.write_text(json.dumps(json.loads(file.read_text()) | {"remarks": ["Flow: DIS."]}))
    assert cli.main([*command, "--set", *settings]) == 0
    last = results(tmp_path, table)["rows"][-1]["row"]
    assert f"\n{last}: Flow: DIS." in capsys.readouterr().out


@pytest.mark.slow
def test_other_video_models_of_table_17(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is trained for 20 steps on the built-in videos, and evaluated as a stream."""
    settings = [*TINY, "data.train_count=20", "data.val_count=2", "data.size=[32,40]"]
    settings += ["data.length=12", "epochs=4", "evaluate_every=4"]
    rows = ("ETC+PSPNet", "NetWarp+OCRNet", "TCB_st-ppm", "TCB_st-ocr", "TCB_st-ocr-mem")
    command = ["ablate", "17", "--out", str(tmp_path), "--quiet", "--rows", ",".join(rows)]
    assert cli.main([*command, "--set", *settings]) == 0
    assert trained == [
        f"{name}-seed0"
        for name in (
            *("pspnet_etc-history=1", "ocrnet_netwarp-history=1"),
            *("pspnet_tcb-history=3-gap=3", "ocrnet_tcb-history=3-gap=3"),
        )
    ]
    found = {row["row"]: row for row in results(tmp_path, "17")["rows"]}
    assert list(found) == list(rows)
    for row in found.values():
        assert {"mIoU", "TC", "VC_8"} <= row["mean"].keys()
    assert "| TCB_st-ocr-mem |" in capsys.readouterr().out
    losses = [
        [json.loads(line) for line in (tmp_path / run / "history.jsonl").read_text().splitlines()]
        for run in trained
    ]
    for entries in losses:
        values = [entry["loss"] for entry in entries if "loss" in entry]
        assert len(values) == 20 and sum(values[-5:]) < sum(values[:5])
    run = trained_run(tmp_path / trained[-1])
    alone = evaluate_videos(run.model(memory_frames=8), run.validation(), flow="given").compute()
    assert found["TCB_st-ocr-mem"]["mean"]["TC"] == 100 * alone.tc.score
    assert found["TCB_st-ocr-mem"]["mean"]["TC"] != found["TCB_st-ocr"]["mean"]["TC"]


def test_camvids_videos_have_estimated_flow(
    camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure.base_config(TABLES["16"], "camvid_video", str(camvid), TINY)
    config.model.backbone = "test_resnet"
    run = runs.TrainedRun(config, tmp_path)
    asked = {}

    def evaluated(model: object, dataset: object, **options: object) -> VideoMetrics:
        asked.update(options)
        return VideoMetrics(11, flow=options["flow"])

    monkeypatch.setattr(runs.TrainedRun, "model", lambda self: None)
    monkeypatch.setattr(videos, "evaluate_videos", evaluated)
    monkeypatch.setattr(engine_video, "default_flow", lambda device, size: DISFlow())
    assert videos.on_videos(run) == {"whole videos": {}}
    assert "TC: 0 pairs of frames, flow: DIS" in run.remarks[0]


def test_what_is_no_table_of_videos_is_one_line(
    tmp_path: Path, fails: Callable[..., str], trained: list[str]
) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert "Table 16 is about videos; there are moving_scenes, camvid_video, vspw" in fails(
        "ablate", "16", "--data", "scenes", *out
    )
    assert "--root" in fails("ablate", "17", "--data", "vspw", *out)
    assert "vary" in fails("ablate", "16", *out, "--set", "data.history=1")
    assert trained == [] and not (tmp_path / "out").exists()

"""``mcibi-fast demo``: FCN with and without MCIBI++ on the built-in scenes."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mcibi_fast.commands import options
from mcibi_fast.commands.outputs import check_folder
from mcibi_fast.files import write_text
from mcibi_fast.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from mcibi_fast.recipes import TrainConfig
    from mcibi_fast.reports.demo import Outcomes

HELP = "train FCN with and without MCIBI++ and compare them"
EXTRA = "report"
EXAMPLES = ("mcibi-fast demo", "mcibi-fast demo --seeds 3 --out runs/three")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many runs, and changes to them."""
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="default: runs/demo")
    parser.add_argument("--seeds", type=int, default=1, help="runs per model (default: 1)")
    options.add_set(parser, "change a field of the recipe, for both models")
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> None:
    """Trains both models with each seed, prints a table and writes a report."""
    from mcibi_fast import recipes
    from mcibi_fast.reports.demo import MODELS, Outcome, build_report, text_table, verdict
    from mcibi_fast.training.owner import owned
    from mcibi_fast.training.state import seed_global_generators
    from mcibi_fast.training.threads import leave_cores_to_loaders
    from mcibi_fast.training.train import train

    if args.seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {args.seeds}")
    out = check_folder("--out", args.out)
    outcomes: Outcomes = {name: [] for name in MODELS}
    for seed in range(args.seeds):
        for name, model in MODELS.items():
            config = recipes.demo(model)
            recipes.apply_settings(config, args.set)
            config.seed = seed
            leave_cores_to_loaders(config.workers)
            folder = out / f"{model}-seed{seed}"
            with owned(folder):
                if (folder / "config.json").is_file():
                    shutil.rmtree(folder)  # an earlier demo's run
            say(f"{name}, seed {seed}")
            seed_global_generators(seed)
            result = train(
                config, folder, progress=not args.quiet, report=lambda line: say(f"  {line}")
            )
            outcomes[name].append(Outcome(result, _confusion(config, folder)))
    report = out / "report.html"
    write_text(report, build_report(outcomes).html())
    say(f"\ntested by: {config.inference}\n{text_table(outcomes)}\n\n{verdict(outcomes)}")
    say(f"report: {report.resolve()}")


def _confusion(config: TrainConfig, folder: Path) -> Tensor:
    """The confusion matrix behind a finished run's scores."""
    from mcibi_fast.inference.evaluate import evaluate
    from mcibi_fast.models.checkpoint import load_model

    dataset = config.data.dataset(config.data.val_split)
    model, _ = load_model(folder / "checkpoints" / "last")
    return evaluate(
        model, dataset, inference=config.inference, batch_size=config.eval_batch_size
    ).matrix

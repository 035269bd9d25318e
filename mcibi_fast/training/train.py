"""Training with accelerate: started directly, by torchrun or by accelerate launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from mcibi_fast.data.functions import Augmentation
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.recipes.parts import named
from mcibi_fast.training.foreign import explained
from mcibi_fast.training.owner import owned
from mcibi_fast.training.precision import with_precision
from mcibi_fast.training.processes import on_main, start_accelerator
from mcibi_fast.training.run import Run, TrainResult
from mcibi_fast.training.trainer import Trainer


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    report: Callable[[str], None] = print,
    augmentation: Augmentation | None = None,
) -> TrainResult:
    """Trains a model and evaluates it, writing everything into a run's directory.

    Initial weights and dropout are drawn from the global generators, which the caller seeds once
    per process; everything else that is random depends on ``config.seed``. A run may be stopped
    anywhere, even by kill -9. When it is resumed, it continues from its last checkpoint (written at
    the end of each epoch and every ``checkpoint_every`` steps) and ends with the same weights as an
    uninterrupted run: bit for bit on the CPU with the same number of threads and processes. With
    ``config.ema`` the averaged weights are evaluated and saved; the others are in the training
    state.

    Args:
        config: the run's configuration.
        out: its directory, see `training.run`.
        resume: continue from the last checkpoint in ``out``.
        progress: show how far it is (on the main process).
        report: takes one line per evaluation (on the main process).
        augmentation: a pipeline of albumentations or a function, see
            `mcibi_fast.data.FunctionTransform`; it replaces ``config.augmentation.function``. A
            resumed run must get the same again.

    Raises:
        ValueError: the configuration or the data cannot be used, a run would continue with other
            data, or another training is using ``out``.
        TrainingError: the loss is not finite, or a batch norm gets one value; the last good
            checkpoint is untouched.
        TooLittleMemoryError: naming what to make smaller.
        OSError: a checkpoint could not be written; the one before is untouched.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with a checkpoint of the last full step written.
    """
    config.validate()
    if augmentation is not None:
        own = config.augmentation
        own = replace(own, function=own.function if resume else named(augmentation))
        config = replace(config, augmentation=own)
    config = with_precision(config, report)
    accelerator = start_accelerator(
        mixed_precision=config.mixed_precision, cpu=config.device == "cpu"
    )
    run = Run(out)
    with ExitStack() as held:
        held.enter_context(explained(config))
        on_main(accelerator, lambda: held.enter_context(owned(run.path, report)))
        trainer = Trainer(
            config,
            run,
            resume=resume,
            progress=progress,
            report=report,
            augmentation=augmentation,
        )
        held.callback(trainer.close)
        try:
            if resume:
                trainer.restore()
            else:
                trainer.start()
            return trainer.run_to_end()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {run.kept()}") from None

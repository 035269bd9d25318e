"""The state and the steps of one training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import gather_object

from mcibi_fast import models, ops
from mcibi_fast.data.functions import Augmentation
from mcibi_fast.data.loading import training_loader
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.inference.labels import check_model
from mcibi_fast.interrupt import deferred_interrupt
from mcibi_fast.models.checkpoint import check_fits, create_model
from mcibi_fast.models.compilation import CompileTime, compile_model, not_compiled
from mcibi_fast.models.weights import load_weights, pack_weights
from mcibi_fast.progress import Progress, beside
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.training.adversarial import Adversary
from mcibi_fast.training.class_weights import build_loss, resolve_class_weights
from mcibi_fast.training.data import describe, model_spec, open_splits
from mcibi_fast.training.ema import WeightAverage
from mcibi_fast.training.loss_log import LossReadings, NotFinite
from mcibi_fast.training.memory_init import initialize_memory
from mcibi_fast.training.micro_batches import accumulate_gradients, check_batch_size
from mcibi_fast.training.optim import build_optimizer
from mcibi_fast.training.precision import fast_kernels, with_precision
from mcibi_fast.training.processes import on_main, start_accelerator
from mcibi_fast.training.run import Run, TrainResult
from mcibi_fast.training.sampling import ClassBalance, class_balance
from mcibi_fast.training.schedule import Schedule
from mcibi_fast.training.state import (
    random_state,
    refusing,
    restore_optimizer,
    restore_random_states,
    restore_transient_buffers,
    transient_buffers,
)
from mcibi_fast.training.trackers import Loggers, check_trackers


class Trainer:
    """State and steps of one run; `training.train.train` is the way to use it."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        *,
        resume: bool = False,
        progress: bool = False,
        report: Callable[[str], None] = print,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.run = run
        config = with_precision(config)
        self.accelerator = start_accelerator(
            mixed_precision=config.mixed_precision, cpu=config.device == "cpu"
        )
        self.is_main = self.accelerator.is_main_process
        self.progress = progress and self.is_main
        self.report = beside(report) if self.is_main else lambda line: None

        self.train_data, self.val_data = open_splits(
            config, run, resume=resume, report=self.report, augmentation=augmentation
        )
        samples, processes = len(self.train_data), self.accelerator.num_processes
        check_batch_size(config.batch_size, config.accumulate, processes, samples)
        loss = resolve_class_weights(
            config.loss,
            self.train_data,
            self.accelerator,
            workers=config.workers,
            progress=self.progress,
        )
        self.loss = build_loss(loss)
        self.config = config = replace(config, loss=loss)
        self.steps_per_epoch = samples // config.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs
        self.spec = model_spec(config, self.train_data)
        options: dict[str, Any] = {"loss": self.loss}
        if resume:
            options["pretrained"] = False  # the checkpoint's weights replace pretrained ones
            check_fits(self.spec, run.weights(), **options)
        model = create_model(self.spec, **options)
        check_model(model, config.inference)
        if model.beginning is not None:
            self.report(f"the model {model.beginning}")
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.model = model.to(self.accelerator.device)
        if config.sync_batchnorm:
            self.model = cast(models.Segmentor, models.convert_sync_batchnorm(self.model))
        self.average = None if config.ema is None else WeightAverage(self.model, config.ema)
        self.wrapped, self.optimizer = self.accelerator.prepare(
            self.model,
            build_optimizer(self.model, config.optimizer, fused=config.speed.fused_optimizer),
        )
        self.schedule = Schedule(self.optimizer, config.optimizer, self.total_steps)
        self.adversary = Adversary(
            config.adversarial, self.train_data, seed=config.seed, device=self.accelerator.device
        )
        self.step = 0
        self.shown = Progress("train", unit="step", total=self.total_steps, show=self.progress)
        self.readings = LossReadings()
        ops.kept_rows()  # those of what ran in this process before are not this training's
        self.evaluated: dict[int, dict[str, Any]] = {}
        self.clock = time.perf_counter()
        self.scalars: Loggers | None = None
        check_trackers(config.trackers)
        config.stopping.check_classes(len(self.spec.classes))
        self.balance: ClassBalance | None = None
        self.compile_time: CompileTime | None = None

    def start(self) -> None:
        """Begins a new run: directory, memory."""
        on_main(self.accelerator, self._begin)
        self._balance()
        initialize_memory(
            self.model,
            self.train_data,
            self.accelerator,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            workers=self.config.workers,
            progress=self.progress,
        )

    def _begin(self) -> None:
        self.run.start(self.config.to_dict())
        self.run.keep_data(describe(self.train_data, self.val_data))

    def restore(self) -> None:
        """Goes back to the last checkpoint.

        Raises:
            ValueError: its files are damaged, or of another run.
        """
        weights, state = self.run.load_state()
        load_weights(self._evaluated_model(), weights)
        with refusing(self.run.path):
            self._restore_state(state)
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.run.rewind(self.step)
            self.run.keep_data(describe(self.train_data, self.val_data))
        self.accelerator.wait_for_everyone()
        self.evaluated = {e["step"]: e["metrics"] for e in self.run.history() if "metrics" in e}
        self._balance()

    def _balance(self) -> None:
        if self.config.sampling == "balanced":
            self.balance = class_balance(
                self.train_data,
                self.run,
                self.accelerator,
                workers=self.config.workers,
                progress=self.progress,
            )

    def _restore_state(self, state: dict[str, Any]) -> None:
        if self.average is not None:
            self.model.load_state_dict(state["weights"])
            restore_transient_buffers(self.average.model, state["transient_buffers"])
        restore_transient_buffers(self.model, state["transient_buffers"])
        restore_optimizer(self.optimizer, state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        if type(self.step) is not int or not 0 <= self.step <= self.total_steps:
            raise ValueError(f"step {self.step!r} of {self.total_steps}")
        self.clock = time.perf_counter() - float(state["seconds"])
        restore_random_states(state["random"], self.accelerator, self.report)

    def run_to_end(self) -> TrainResult:
        """Trains and evaluates until the last step is done."""
        if self.is_main:
            self.scalars = Loggers(
                self.config, self.run, self.accelerator, step=self.step, report=self.report
            )
        if self.config.speed.compile:  # not earlier: the memory is initialised without gradients
            compile_model(self.model, sizes_differ=False)
            self.compile_time = CompileTime(self.report)
        # Evaluation is included: an interrupt during a library's clean-up can get lost.
        self.shown.done = self.step
        with deferred_interrupt() as interrupted, self.shown:
            while True:
                if self._evaluation_is_due():
                    self._evaluate(interrupted)
                if self.step >= self.total_steps or self._is_over():
                    break
                self._train_epoch(interrupted)
        return TrainResult(
            out=self.run.path,
            steps=self.step,
            seconds=time.perf_counter() - self.clock,
            metrics=self.evaluated[self.step],
            best=self.evaluated[self._best_step()],
        )

    def close(self) -> None:
        """Releases what the run holds."""
        if self.scalars is not None:
            self.scalars.close()
        self.accelerator.free_memory()

    def batches(self, epoch: int, start: int = 0) -> Iterable[dict[str, Any]]:
        """This rank's batches of an epoch, from a step of it on."""
        order = None
        if self.balance is not None:
            order = self.balance.order(seed=self.config.seed, epoch=epoch)
        return training_loader(
            self.train_data,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            start=start,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            workers=self.config.workers,
            device=self.accelerator.device,
            order=order,
        )

    def _train_epoch(self, interrupted: Callable[[], bool]) -> None:
        config = self.config
        epoch, start = divmod(self.step, self.steps_per_epoch)
        batches = self.batches(epoch, start)
        self.shown.rename(f"epoch {epoch + 1}/{config.epochs}")
        self.wrapped.train()
        for batch in batches:
            with fast_kernels(config.speed, self.accelerator.device):
                self._train_step(batch)
            stop = self._agree(interrupted)
            checkpoint = self._checkpoint_is_due() or stop
            loss = None
            if checkpoint or self.step % config.log_every == 0:
                loss = self._read_losses()
            elif self.shown.is_due():
                loss = self.readings.recent()
            self.shown.advance(note=None if loss is None else f"loss {loss:.4f}")
            if checkpoint:
                self._save()
            if stop:
                raise KeyboardInterrupt

    def _train_step(self, batch: dict[str, Any]) -> None:
        factor = self.schedule.apply(self.step)
        self.model.schedule(epoch=self.step // self.steps_per_epoch, lr_factor=factor)
        attacked = self.adversary.attacks(self.step)
        losses = accumulate_gradients(
            self.accelerator,
            self.wrapped,
            batch,
            parts=self.config.accumulate,
            loss=self.loss,
            ignore_index=self.spec.ignore_index,
            attack=partial(self.adversary.attack, self.model) if attacked else None,
        )
        if (norm := self.config.optimizer.clip_norm) is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.model)
        self.step += 1
        if self.compile_time is not None:
            self.compile_time.tell()
        # Read later: reading now would make the host wait for the device at every step.
        self.readings.add(self.step, losses)

    def _read_losses(self) -> float:
        """Waits for the device, checks all losses since the last reading, and logs their mean."""
        try:
            means = self.readings.read(self.accelerator)
        except NotFinite as error:
            raise error.explained(self.run.checkpoint("last")) from None
        if kept := ops.kept_rows():
            self.report(
                f"step {self.step}: the memory kept the rows of {kept} classes whose features are "
                "not finite"
            )
        loss = sum(means.values())
        if self.scalars is not None:
            lr = self.schedule.lr
            self.run.record(step=self.step, lr=lr, loss=loss, losses=means)
            self.scalars.add(self.step, {"loss": loss, "learning_rate": lr} | means, "train/")
            epoch, within = divmod(self.step, self.steps_per_epoch)
            if not within:  # the host has waited anyway
                self.run.record_memory(self.model, step=self.step, epoch=epoch)
        return loss

    def _agree(self, interrupted: Callable[[], bool]) -> bool:
        """Whether to stop: immediately with one process, otherwise when the loss is read anyway."""
        if self.accelerator.num_processes == 1:
            return interrupted()
        if self.step % self.config.log_every and not self._checkpoint_is_due():
            return False
        flag = torch.tensor([float(interrupted())], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint_every
        return self.step % self.steps_per_epoch == 0 or (every > 0 and self.step % every == 0)

    def _save(self) -> None:
        scaler = self.accelerator.scaler
        random = gather_object([random_state()])
        if not self.is_main:
            return
        self.run.save(
            self.step,
            pack_weights(self._evaluated_model(), self.spec),
            {
                "step": self.step,
                "weights": None if self.average is None else self.model.state_dict(),
                "seconds": time.perf_counter() - self.clock,
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "transient_buffers": transient_buffers(self.model),
                "random": random,
            },
        )

    def _evaluation_is_due(self) -> bool:
        epoch, within = divmod(self.step, self.steps_per_epoch)
        due = epoch % self.config.evaluate_every == 0 or self.step == self.total_steps
        return epoch > 0 and within == 0 and due and self.step not in self.evaluated

    def _evaluate(self, interrupted: Callable[[], bool]) -> None:
        with not_compiled():
            confusion = evaluate(
                self._evaluated_model(),
                self.val_data,
                inference=self.config.inference,
                batch_size=self.config.eval_batch_size,
                workers=self.config.workers,
                accelerator=self.accelerator,
                progress=self.progress,
                interrupted=interrupted,
            )
        metrics = confusion.compute()
        self.evaluated[self.step] = metrics.as_dict(self.spec.classes)
        epoch = self.step // self.steps_per_epoch
        self.report(
            f"epoch {epoch}/{self.config.epochs}  mIoU {100 * metrics.mean_iou:.2f}  "
            f"pixel accuracy {100 * metrics.pixel_accuracy:.2f}  "
            f"{time.perf_counter() - self.clock:.0f} s"
        )
        if self.scalars is not None:
            # Recorded last: a run killed before this line evaluates again once it is resumed.
            if self._best_step() == self.step:
                self.run.mark_best(self.step)
            self.scalars.add(self.step, metrics.summary(), "val/")
            self.run.record(step=self.step, epoch=epoch, metrics=self.evaluated[self.step])

    def _is_over(self) -> bool:
        """Whether nothing has improved for as many evaluations as ``config.stopping`` says."""
        stopping = self.config.stopping
        over = self.step in self.evaluated and stopping.is_over(
            [self.evaluated[step] for step in sorted(self.evaluated)]
        )
        if over:
            self.report(
                f"stopped after epoch {self.step // self.steps_per_epoch}: {stopping.metric} has "
                f"not improved in {stopping.patience} evaluations"
            )
        return over

    def _evaluated_model(self) -> models.Segmentor:
        """The model that is evaluated and saved: the averaged one, if an average is kept."""
        return self.model if self.average is None else self.average.model

    def _best_step(self) -> int:
        """The evaluated step with the best mIoU, the first of equals."""
        return max(self.evaluated, key=lambda step: self.evaluated[step]["mean_iou"] or 0.0)

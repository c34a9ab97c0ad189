"""Checkpoints that are whole or not there: the last, the best, and one every N steps."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.checkpoint_files import (
    BEST,
    LAST,
    CheckpointFiles,
    find_whole_checkpoint,
    step_of,
)
from segtrain.errors import UserError
from segtrain.training import log_metrics

MONITOR = "val/mIoU"


class Checkpoints(Callback):
    """Writes ``last.ckpt``, ``best.ckpt`` and, if several are kept, ``step-000500.ckpt``.

    The checkpoint that ``last.ckpt`` was before stays as ``previous.ckpt``. One that cannot be
    written, on a full disk say, is a warning: the training goes on, and the next one is tried.

    ``last.ckpt`` follows every N optimiser steps and the end of the training; where a step is
    validated as well, after that validation, so that resuming does not repeat it. ``best.ckpt``
    holds the weights with the highest mIoU at the training setting, which is logged as
    ``best/mIoU``.

    Args:
        run_folder: the files go to its folder ``checkpoints``.
        every: N.
        keep: how many step files to keep, the newest; 1 keeps none beside ``last.ckpt``, -1 all.
    """

    def __init__(self, run_folder: Path, every: int = 1000, keep: int = 1) -> None:
        if every < 1:
            raise UserError(f"callbacks.checkpoints.every is at least 1, not {every}")
        if keep < 1 and keep != -1:
            raise UserError(f"callbacks.checkpoints.keep is -1 or at least 1, not {keep}")
        self.folder = Path(run_folder) / "checkpoints"
        self.every = every
        self.keep = keep
        self.best = -math.inf
        self.files = CheckpointFiles()
        self._written_step = -1

    def state_dict(self) -> dict[str, Any]:
        """The best mIoU so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best mIoU so far."""
        self.best = state_dict["best"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder, and have the strategy write through ``files``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.strategy.checkpoint_io = self.files

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the step from which a resumed run goes on as written."""
        self._written_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write every N steps, unless the validation of this step comes first."""
        if not validates_now(trainer) and self._is_due(trainer):
            self._write(trainer, self._due_names(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is due at this step, and the best."""
        if trainer.sanity_checking or trainer.state.fn is not TrainerFn.FITTING:
            return
        names = self._due_names(trainer) if self._is_due(trainer) else []
        accuracy, before = float(trainer.callback_metrics[MONITOR]), self.best
        if accuracy > self.best:
            self.best = accuracy
            names.append(BEST)
        log_metrics(trainer, {"best/mIoU": self.best})
        if names and not self._write(trainer, names):
            self.best = before  # of best.ckpt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the end of a training that was told to stop before its last step."""
        self.write_now(trainer)

    def write_now(self, trainer: Trainer, provisional: bool = False) -> None:
        """Write ``last.ckpt`` of this step, if it is not there; a collective.

        A provisional one is written again after the validation of the step.
        """
        if self._written_step != trainer.global_step:
            self._write(trainer, self._due_names(trainer))
        if provisional:
            self._written_step = -1

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        # With accumulation, several batches end at the same step.
        return step != self._written_step and (step % self.every == 0 or step == trainer.max_steps)

    def _due_names(self, trainer: Trainer) -> list[str]:
        return [LAST] + ([f"step-{trainer.global_step:06d}.ckpt"] if self.keep != 1 else [])

    def _write(self, trainer: Trainer, names: list[str]) -> bool:
        """Write one checkpoint under several names; whether it is there, the same on all ranks."""
        first, *others = names
        trainer.save_checkpoint(self.folder / first, weights_only=False)
        if trainer.is_global_zero:
            for name in others:
                if self.files.failure is None:
                    self.files.copy(self.folder / first, self.folder / name)
            if self.files.failure is not None:
                self._warn(trainer.global_step)
        # Rank zero alone writes; whether the step is still due has to be the same on all ranks.
        if trainer.strategy.broadcast(self.files.failure) is not None:
            return False
        if LAST in names:
            self._written_step = trainer.global_step
        if trainer.is_global_zero and self.keep > 1:
            steps = sorted(self.folder.glob("step-*.ckpt"), key=lambda path: path.stat().st_mtime)
            for path in steps[: -self.keep]:
                path.unlink()
        return True

    def _warn(self, step: int) -> None:
        kept = find_whole_checkpoint(self.folder)
        there = f"{kept} is of step {step_of(kept)}" if kept else "there is none before it"
        warnings.warn(
            f"checkpoint at step {step} could not be written ({self.files.failure}); {there}",
            stacklevel=2,
        )


def validates_now(trainer: Trainer) -> bool:
    """Whether a validation follows the training batch that has just ended."""
    batches = trainer.fit_loop.total_batch_idx + 1
    return trainer.enable_validation and batches % (trainer.val_check_batch or math.inf) == 0

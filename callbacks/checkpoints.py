"""Checkpoints that are whole or not there: the last, the best, and one every N steps."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from segtrain.errors import UserError
from segtrain.training import log_metrics

MONITOR = "val/mIoU"


class Checkpoints(Callback):
    """Writes ``last.ckpt``, ``best.ckpt`` and, if several are kept, ``step-000500.ckpt``.

    ``last.ckpt`` follows every N optimiser steps and the end of the training; where a step is
    validated as well, after that validation, so that resuming does not repeat it. ``best.ckpt``
    holds the weights with the highest mIoU at the training setting, which is logged as
    ``best/mIoU``. An interrupted training leaves the files of its last complete checkpoint.

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
        self._written_step = -1

    def state_dict(self) -> dict[str, Any]:
        """The best mIoU so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best mIoU so far."""
        self.best = state_dict["best"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

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
        batches = trainer.fit_loop.total_batch_idx + 1
        validates = (
            trainer.enable_validation and batches % (trainer.val_check_batch or math.inf) == 0
        )
        if not validates and self._is_due(trainer):
            self._write(trainer, self._due_names(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is due at this step, and the best."""
        if trainer.sanity_checking or trainer.state.fn is not TrainerFn.FITTING:
            return
        names = self._due_names(trainer) if self._is_due(trainer) else []
        accuracy = float(trainer.callback_metrics[MONITOR])
        if accuracy > self.best:
            self.best = accuracy
            names.append("best.ckpt")
        log_metrics(trainer, {"best/mIoU": self.best})
        if names:
            self._write(trainer, names)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the end of a training that was told to stop before its last step."""
        if self._written_step != trainer.global_step:
            self._write(trainer, self._due_names(trainer))

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        # With accumulation, several batches end at the same step.
        return step != self._written_step and (step % self.every == 0 or step == trainer.max_steps)

    def _due_names(self, trainer: Trainer) -> list[str]:
        self._written_step = trainer.global_step
        return ["last.ckpt"] + ([f"step-{trainer.global_step:06d}.ckpt"] if self.keep != 1 else [])

    def _write(self, trainer: Trainer, names: list[str]) -> None:
        temporary = self.folder / ".writing"
        trainer.save_checkpoint(temporary, weights_only=False)  # collective
        if not trainer.is_global_zero:
            return
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        for name in names:
            link = self.folder / ".linking"
            link.unlink(missing_ok=True)
            try:
                os.link(temporary, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(temporary, link)
            link.replace(self.folder / name)
        temporary.unlink()
        if self.keep > 1:
            steps = sorted(self.folder.glob("step-*.ckpt"), key=lambda path: path.stat().st_mtime)
            for path in steps[: -self.keep]:
                path.unlink()

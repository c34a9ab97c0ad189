"""SIGTERM and SIGUSR1, by which schedulers announce the end of a job, stop a run in order."""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.checkpoints import Checkpoints, validates_now

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
#: Seconds in which SIGTERM counts once: a scheduler signals every process of a job, and launchers
#: (torchrun, uv run) pass on to theirs what they got.
ONE_SIGTERM = 1.0


class StopOnSignal(Callback):
    """Ends the training after the optimiser step, or the validation, in which a signal arrives.

    It is enough that one rank is told. ``last.ckpt`` is then of that step. Where the step is
    validated, it is written before the validation as well, in case the time left is too short. A
    second SIGTERM, a second later or more, ends the process at once. A training that is at its last
    step just ends.

    Attributes:
        stopped_by: the number of the signal that ended the training, the same on all ranks.
    """

    stopped_by: int | None = None

    def __init__(self) -> None:
        self._received = 0
        self._first_sigterm = math.inf
        self._replaced: dict[int, Any] = {}
        self._step = 0

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, in place of Lightning's handlers."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, and stop before the first step if told to by now."""
        self._listen(trainer)
        self._step = trainer.global_step
        self._stop_if_told(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop at the end of an optimiser step."""
        # With accumulation, several batches end at the same step.
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._stop_if_told(trainer, validates=validates_now(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after a validation; within one, ranks differ in their number of batches."""
        if not trainer.sanity_checking:
            self._stop_if_told(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._give_back()

    def _listen(self, trainer: Trainer) -> None:
        if self._replaced:
            return
        if trainer.received_sigterm:  # before this callback could take over from Lightning
            self._received = signal.SIGTERM

        def note(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if number == signal.SIGTERM:
                self._first_sigterm = min(self._first_sigterm, now)
            if number == signal.SIGTERM and now - self._first_sigterm > ONE_SIGTERM:
                launcher = trainer.strategy.launcher
                if launcher is not None:  # ranks that wait for this one would never end
                    launcher.kill(signal.SIGKILL)
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            # The first one counts: a scheduler that announces the end by SIGUSR1 adds a SIGTERM.
            self._received = self._received or number

        # Lightning's own handler for SIGTERM sends it on and starts a collective wherever the
        # training happens to be, and saves nothing.
        self._replaced = {number: signal.signal(number, note) for number in SIGNALS}

    def _give_back(self) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced = {}

    def _stop_if_told(self, trainer: Trainer, validates: bool = False) -> None:
        number = self._received
        if trainer.world_size > 1:
            told = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(told, reduce_op="max"))
        if number == 0 or trainer.global_step == trainer.max_steps:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.write_now(trainer, provisional=validates)
        if not validates:
            self.stopped_by = number
            trainer.should_stop = True
            # Lightning would validate once more.
            trainer.limit_val_batches = 0

"""Where the training is: loss, images per second and time left, then the curve so far."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from callbacks.charts import describe_gmacs
from callbacks.cost_curve import CostCurve


class Progress(Callback):
    """A bar over optimiser steps on a terminal, a plain line every few steps elsewhere.

    Takes the place of Lightning's own bar: ``Trainer(enable_progress_bar=False)``.

    Args:
        every: optimiser steps between two updates of loss, speed and time left.
    """

    def __init__(self, every: int = 20) -> None:
        self.every = every
        self.console = Console()
        self._bar: Bar | None = None
        self._interval_started = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show nothing on ranks other than zero."""
        self._enabled = trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks and the bar."""
        self._first_step = self._drawn_step = trainer.global_step
        self._started = self._interval_started = time.monotonic()
        self._images = 0
        if self._enabled and self.console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                console=self.console,
            )
            self._steps = self._bar.add_task(
                "training", total=trainer.max_steps, completed=trainer.global_step, status=""
            )
            self._batches = self._bar.add_task("validation", visible=False, status="")
            self._bar.start()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Advance."""
        self._images += len(batch["image"]) * trainer.world_size
        step = trainer.global_step
        if not self._enabled or step == self._drawn_step:
            return
        self._drawn_step = step
        if self._bar is not None:
            self._bar.update(self._steps, completed=step)
        if step % self.every == 0 or step == trainer.max_steps:
            status = self._status(trainer, float(outputs["loss"]))
            if self._bar is not None:
                self._bar.update(self._steps, status=status)
            else:
                self.console.print(f"step {step}/{trainer.max_steps}  {status}", highlight=False)

    def _status(self, trainer: Trainer, loss: float) -> str:
        now = time.monotonic()
        speed = self._images / max(now - self._interval_started, 1e-9)
        self._images, self._interval_started = 0, now
        # Over the whole training so far, so that validations are part of the estimate.
        per_step = (now - self._started) / (trainer.global_step - self._first_step)
        left = timedelta(seconds=round(per_step * (trainer.max_steps - trainer.global_step)))
        return f"loss {loss:.4f}  {speed:.1f} images/s  {left} left"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show how far the validation is."""
        self._validation_started = time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._batches, total=trainer.num_val_batches[0], visible=True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance."""
        if self._bar is not None:
            self._bar.update(self._batches, completed=batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the curve."""
        if self._bar is not None:
            self._bar.update(self._batches, visible=False)
        # Images per second are of training: take the validation out of the interval.
        self._interval_started += time.monotonic() - self._validation_started
        if trainer.sanity_checking or not self._enabled:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, CostCurve):
                newest = [r for r in callback.rows if r["step"] == trainer.global_step]
                if newest:
                    self.console.print(curve_table(newest))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last state of the bar on the screen."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def curve_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of one validation as a table: cost and accuracy of each setting."""
    full = rows[0]
    table = Table(title=f"step {full['step']}: accuracy against cost", title_justify="left")
    table.add_column("setting")
    for column in ("GMACs", "latency", "mIoU", "change"):
        table.add_column(column, justify="right")
    for row in rows:
        latency = row["cost"]["latency_ms"]
        table.add_row(
            row["setting"] + (" *" if row["on_front"] else ""),
            describe_gmacs(row["cost"]),
            "" if latency is None else f"{latency:.1f} ms",
            f"{100 * row['mIoU']:.2f}",
            "" if row is full else f"{100 * (row['mIoU'] - full['mIoU']):+.2f}",
        )
    table.caption = "* no other setting is both cheaper and better"
    return table

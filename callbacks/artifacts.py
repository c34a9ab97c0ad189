"""Checkpoints in Weights & Biases, each with the curve that belongs to it."""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.checkpoint_files import BEST, LAST, CheckpointFiles, step_of
from callbacks.jsonl import CURVE, append_rows, read_rows
from callbacks.resume import CHECKPOINT
from callbacks.tracking import wandb_errors_as_warnings, wandb_runs

#: Seconds to wait for uploads at the end of a training. One that was told to stop may be about to
#: lose its machine; other ranks, waiting for this one, give up after some ten minutes.
PATIENCE, PATIENCE_IF_STOPPED = 300, 10


@dataclass
class _Held:
    """Files of a checkpoint that nobody replaces, for as long as W&B may read them."""

    run: Any
    step: int
    aliases: list[str]
    folder: Path
    rows: Sequence[Mapping[str, Any]] = field(repr=False)


class Artifacts(Callback):
    """Keeps checkpoints as versions of the W&B artifact ``checkpoint-RUN_ID``, of type ``model``.

    A version holds ``checkpoint.ckpt`` and ``curve.jsonl``, the curve up to that step. Its aliases
    are ``step-N``, ``best`` if it is, and ``latest`` until a later one comes; its metadata
    ``step``, ``mIoU`` (at the training setting; None where that step was not validated) and
    ``settings``, the ``gmacs``, ``latency_ms`` and ``mIoU`` of each.

    Online, each ``last.ckpt`` and ``best.ckpt`` is sent once it is written, by a thread of its own.
    Offline, the two that are there at the end of the training are kept for ``wandb sync``. A
    failing W&B is a warning and never stops or delays the training.

    W&B reads a file when it comes to it, and by then ``last.ckpt`` may be another one. So it gets
    a hard link of ours in ``wandb/checkpoints``, which is removed once it is sent: it costs nothing
    until the checkpoint itself is replaced (a copy, on file systems without hard links).

    Args:
        run_folder: the run's folder.
    """

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = Path(run_folder)
        self._runs: list[Any] = []
        self._saved = False
        self._sent: set[int] = set()
        self._waiting: queue.Queue[_Held | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the W&B run."""
        self._runs = wandb_runs(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at the files in the next hook: the checkpoint is written in between."""
        self._saved = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Send what was written after this step, online."""
        self._send_new(online=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send what was written after this validation, online."""
        self._send_new(online=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the rest, and wait for it for a while."""
        self._send_new(online=True)
        finished = trainer.global_step >= trainer.max_steps
        # A run that is stopped and resumed many times would keep a copy for each time.
        if finished:
            self._send_new(online=False)
        if self._thread is None:
            return
        self._waiting.put(None)
        self._thread.join(PATIENCE if finished else PATIENCE_IF_STOPPED)
        self._thread = None

    def _send_new(self, online: bool) -> None:
        if not self._saved:
            return
        for run in self._runs:
            if run.offline == online:
                continue
            self._saved = False
            with wandb_errors_as_warnings("a checkpoint"):
                self._hold_new(run)

    def _hold_new(self, run: Any) -> None:
        folder = self.run_folder / "checkpoints"
        steps = {name: step_of(folder / name) for name in (LAST, BEST) if (folder / name).exists()}
        # By rising step, because W&B moves an alias to the version that it got last.
        for step, name in sorted({step: name for name, step in steps.items()}.items()):
            if step in self._sent:
                continue
            self._sent.add(step)
            aliases = ["latest", f"step-{step}"] + ["best"] * (step == steps.get(BEST))
            held = self._hold(run, folder / name, step, aliases)
            if self._thread is None:
                # Not to be waited for when the process ends.
                self._thread = threading.Thread(target=self._send_held, daemon=True)
                self._thread.start()
            self._waiting.put(held)

    def _hold(self, run: Any, checkpoint: Path, step: int, aliases: list[str]) -> _Held:
        place = self.run_folder.absolute() / "wandb" / "checkpoints"
        place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"step-{step}-", dir=place))
        files = CheckpointFiles()
        files.copy(checkpoint, folder / CHECKPOINT)
        if files.failure is not None:
            raise OSError(files.failure)
        rows = [row for row in read_rows(self.run_folder / CURVE) if row["step"] <= step]
        append_rows(folder / CURVE, rows)
        return _Held(run, step, aliases, folder, rows)

    def _send_held(self) -> None:
        while (held := self._waiting.get()) is not None:
            with wandb_errors_as_warnings(f"the checkpoint of step {held.step}"):
                _send(held)


def _send(held: _Held) -> None:
    import wandb

    artifact = wandb.Artifact(
        f"checkpoint-{held.run.id}", type="model", metadata=_metadata(held.step, held.rows)
    )
    for path in sorted(held.folder.iterdir()):
        # Not copied by W&B: it would do so into a folder of its own, twice.
        artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
    artifact = held.run.log_artifact(artifact, aliases=held.aliases)
    if held.run.offline:
        return  # sent by wandb sync, which reads the files then
    artifact.wait()
    for path in held.folder.iterdir():
        path.unlink()
    held.folder.rmdir()


def _metadata(step: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [row for row in rows if row["step"] == step]
    training = [row["mIoU"] for row in rows if row["training_setting"]]
    settings = {
        row["setting"]: {
            "gmacs": row["cost"]["gmacs"],
            "latency_ms": row["cost"]["latency_ms"],
            "mIoU": row["mIoU"],
        }
        for row in rows
    }
    return {"step": step, "mIoU": training[0] if training else None, "settings": settings}

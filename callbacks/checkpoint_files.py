"""Checkpoint files that are whole or not there, and the newest whole one of a run."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from segtrain.checkpoints import damage
from segtrain.errors import first_line

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and gives it its own once it is on the disk.

    A new ``last.ckpt`` makes the one that it takes the place of ``previous.ckpt``. A file that
    cannot be written leaves those that are there as they are. That is not raised, for the other
    ranks are waiting: it stands in ``failure``, on rank zero alone.

    Attributes:
        failure: why the last file was not written; None if it was.
    """

    failure: str | None = None
    _written: Path | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write plain values and tensors to a file."""
        path = Path(path)
        temporary = path.with_name(".writing")
        self.failure = None
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and self._is_good(path):
                self._link(path, path.with_name(PREVIOUS))
            _rename(temporary, path)
            self._written = path if path.name == LAST else self._written
        except (OSError, RuntimeError) as error:
            self.failure = _reason(error)
        finally:
            with contextlib.suppress(OSError):  # on a disk that has become read-only
                temporary.unlink()

    def copy(self, path: Path, other: Path) -> None:
        """Give a checkpoint a second name, at no cost where the file system has hard links."""
        self.failure = None
        try:
            self._link(path, other)
        except OSError as error:
            self.failure = _reason(error)

    def _is_good(self, path: Path) -> bool:
        # What this process wrote is whole; reading it again would take as long as writing it.
        return path == self._written or damage(path) is None

    def _link(self, path: Path, other: Path) -> None:
        temporary = path.with_name(".linking")
        temporary.unlink(missing_ok=True)
        try:
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            _rename(temporary, other)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def find_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that can be read to its end; None if there is none.

    That is ``last.ckpt``, else the step file of the latest step, else ``previous.ckpt``. Each one
    that is passed over because it is damaged is named in a line on stderr.
    """
    steps = sorted(folder.glob("step-*.ckpt"), key=lambda path: int(path.stem[len("step-") :]))
    for path in [folder / LAST, *reversed(steps), folder / PREVIOUS]:
        if not path.exists():
            continue
        reason = damage(path)
        if reason is None:
            return path
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            print(
                f"segtrain: warning: {path} is damaged ({reason}): "
                "the checkpoint before it is used",
                file=sys.stderr,
            )
    return None


def step_of(path: Path) -> int:
    """The optimiser step of a whole checkpoint."""
    return torch.load(path, weights_only=True, mmap=True)["global_step"]


def _rename(path: Path, other: Path) -> None:
    path.replace(other)
    folder = os.open(other.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too, has to be on the disk
    finally:
        os.close(folder)


def _reason(error: BaseException) -> str:
    """The system's own words, which torch hides behind what it notices after them."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return first_line(error)

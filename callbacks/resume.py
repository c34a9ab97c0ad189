"""Where a stopped run goes on: from its own folder, a checkpoint, or what W&B keeps of it."""

from __future__ import annotations

import contextlib
import json
import pickle
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from callbacks.checkpoint_files import find_whole_checkpoint
from callbacks.jsonl import CURVE
from segtrain.checkpoints import damage
from segtrain.config import to_yaml
from segtrain.errors import UserError
from segtrain.wandb_checkpoints import CHECKPOINT, WANDB, download_files, parse_address

_TIMEOUT = 30  # seconds to wait for the W&B server
_PATIENCE = 600  # seconds that other ranks wait for the first one to bring a run
#: What a checkpoint needs to be gone on from.
_NEEDED = ("config", "state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")


@rank_zero_only
def say(message: str) -> None:
    """One line about the resumed run, on standard error."""
    print(f"resume: {message}", file=sys.stderr)


class Provenance(Callback):
    """Notes in every checkpoint of which run it is and how large a step was, under ``run``.

    When a checkpoint is loaded to go on from, says in one line if a step takes another number of
    images now. The data go on behind the images seen, whatever it is.
    """

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = Path(run_folder)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add ``{"name", "wandb_id", "processes", "images_per_step"}``."""
        checkpoint["run"] = {
            "name": self.run_folder.name,
            "wandb_id": _read_record(self.run_folder).get("wandb_id"),
            "processes": trainer.world_size,
            "images_per_step": _images_per_step(trainer),
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare the steps."""
        run = checkpoint.get("run")
        if run is None or not trainer.training:
            return
        before, now = run["images_per_step"], _images_per_step(trainer)
        parts = []
        if run["processes"] != trainer.world_size:
            count = run["processes"]
            parts.append(
                f"{count} process{'es' if count > 1 else ''} before, {trainer.world_size} now"
            )
        if before != now:
            parts.append(f"a step takes {now} images instead of {before}")
        if parts:
            say(": ".join(parts))


def _images_per_step(trainer: Trainer) -> int:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return int(data.batch_size * trainer.accumulate_grad_batches * trainer.world_size)


def find_checkpoint(folder: Path, chosen: Path | None, steps: int, shown: Path) -> Path | None:
    """The checkpoint that a run goes on from, which is said in one line.

    Args:
        folder: the run's.
        chosen: a file in place of the newest whole one.
        steps: how many the run is to have in the end.
        shown: the folder as messages name it.

    Returns:
        None where the run was stopped before its first checkpoint: it starts from the beginning.

    Raises:
        UserError: all checkpoints are damaged, or the file is none to go on from.
    """
    path = chosen or find_whole_checkpoint(folder / "checkpoints")
    if path is None:
        damaged = sorted(file.name for file in (folder / "checkpoints").glob("*.ckpt"))
        if damaged:
            raise UserError(
                f"resume={shown}: its newest checkpoints are damaged; there is "
                f"{', '.join(damaged)} in {shown / 'checkpoints'}, to be named as resume=FILE"
            )
        say(f"{shown} has no checkpoint yet, starts from the beginning")
        return None
    step = read_checkpoint(path, check=chosen is not None)["global_step"]
    if step < steps:
        say(f"{shown} goes on from step {step} of {steps} ({path.name})")
    else:
        say(f"{shown} has all its {steps} steps; schedule.steps=N makes it longer")
    return path


def read_checkpoint(path: Path, check: bool = True) -> dict[str, Any]:
    """The content of a checkpoint of a training; its tensors are left on the disk.

    Args:
        path: of the file.
        check: whether to read it through for damage.

    Raises:
        UserError: the file is not there, is damaged, holds code, or is of something else.
    """
    if not path.is_file():
        raise UserError(f"resume={path}: there is no such file")
    reason = damage(path) if check else None
    if reason is not None:
        raise UserError(f"resume={path}: no whole checkpoint ({reason})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"resume={path}: holds more than tensors and plain values, which could run code: "
            "refused"
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError):
        raise UserError(f"resume={path}: no checkpoint") from None
    for key in _NEEDED:
        if not isinstance(content, dict) or key not in content:
            raise UserError(
                f"resume={path}: has no '{key}', so no run goes on from it; weights={path} starts "
                "a new one with its weights"
            )
    return content


def bring_run(source: str, runs: Path, name: str | None) -> tuple[Path, bool]:
    """A run folder for a checkpoint outside of one, or for what W&B keeps of a run.

    A folder that is there already is never written over. Only where this very source was brought
    before, as when a job is started again, its folder goes on. Ranks other than zero wait for it.

    Args:
        source: ``PATH.ckpt`` or ``wandb:entity/project/RUN_ID[:alias]``.
        runs: the folder of run folders.
        name: of the run's folder; None takes the name that the run had.

    Returns:
        The folder, and whether it is a new one under a temporary name, for the caller to rename.

    Raises:
        UserError: what `source` names is not there, cannot be reached, is not a run's, or is of a
            run that has another folder here.
    """
    wandb_id: str | None
    if source.startswith(WANDB):
        wandb_id = parse_address(source, f"resume={source}").run_id
    else:
        wandb_id = (read_checkpoint(Path(source)).get("run") or {}).get("wandb_id")
    for _ in range(_PATIENCE):
        local = _find_local(source, wandb_id, runs, name)
        if local is not None:
            say(f"{source} was brought into {local} before, which goes on")
            return local, False
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            break
        time.sleep(1)
    else:
        raise UserError(f"resume={source}: the first process has not brought it into {runs}")
    runs.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".resume-", dir=runs))
    try:
        _fill(folder, source, wandb_id, name)
    except BaseException:
        shutil.rmtree(folder)
        raise
    folder.chmod(0o755)  # mkdtemp's is for the owner alone
    return folder, True


def _fill(folder: Path, source: str, wandb_id: str | None, name: str | None) -> None:
    """Lay out a run folder from what `source` names."""
    file = folder / "checkpoints" / "last.ckpt"
    file.parent.mkdir()
    if source.startswith(WANDB):
        shown = f"resume={source}"
        address = parse_address(source, shown)
        download_files(address, folder, [CHECKPOINT, CURVE], shown, _TIMEOUT)
        (folder / CHECKPOINT).replace(file)
    else:
        shutil.copyfile(source, file)
    content = read_checkpoint(file, check=source.startswith(WANDB))
    config = content["config"]
    _check_plain(source, config)
    name = str(name or (content.get("run") or {}).get("name") or Path(source).stem)
    (folder / "config.yaml").write_text(to_yaml(config | {"name": name}), encoding="utf-8")
    record = {
        "name": name,
        "wandb_id": wandb_id or secrets.token_hex(4),
        "resumed_from": source,
    }
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _find_local(source: str, wandb_id: str | None, runs: Path, name: str | None) -> Path | None:
    """The folder into which `source` was brought before.

    Raises:
        UserError: there is none, but another folder of that run.
    """
    folders = [runs / name] if name else sorted(file.parent for file in runs.glob("*/run.json"))
    others = []
    for folder in folders:
        record = _read_record(folder)
        if folder.name.startswith(".") or wandb_id not in (None, record.get("wandb_id")):
            continue
        if record.get("resumed_from") == source:
            return folder
        others.append(folder)
    if others and wandb_id is not None:
        raise UserError(
            f"resume={source}: {others[0]} is of that run: resume={others[0]} goes on there, "
            "name=NAME beside it brings the checkpoint into a folder of its own"
        )
    return None


def _read_record(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    return {}


def _check_plain(source: str, config: object) -> None:
    """Raise UserError unless a configuration holds plain values, and no interpolation to resolve.

    An interpolation could read the environment of whoever resumes a stranger's checkpoint.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            _check_plain(source, key)
            _check_plain(source, value)
    elif isinstance(config, list):
        for value in config:
            _check_plain(source, value)
    elif not isinstance(config, str | int | float | None):
        raise UserError(f"resume={source}: its configuration holds a {type(config).__name__}")
    elif isinstance(config, str) and "${" in config:
        raise UserError(f"resume={source}: its configuration holds '{config}', which is refused")

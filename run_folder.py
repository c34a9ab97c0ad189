"""Which folder a run has: a new one, the one it goes on in, the same on all ranks.

Imports no torch, so that a slip is answered at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segtrain.config import ComposedConfig, last_value
from segtrain.errors import UserError

#: Tells the processes that the first one starts which name it chose for the run.
RUN_NAME = "SEGTRAIN_RUN_NAME"


@dataclass(frozen=True)
class ResumedRun:
    """The run that `resume=` names.

    Attributes:
        folder: holds its `config.yaml`.
        checkpoint: where it goes on; None for the newest whole one in the folder.
        brought: whether the folder is new and still to be renamed to its place.
    """

    folder: Path
    checkpoint: Path | None = None
    brought: bool = False


@contextlib.contextmanager
def find_run(arguments: list[str]) -> Iterator[ResumedRun | None]:
    """The run that goes on; None without `resume=`. A new folder that is not used is removed.

    Raises:
        UserError: a checkpoint or a run that W&B keeps cannot be had.
    """
    source = last_value(arguments, "resume")
    path = Path(source or "")
    if source is None:
        yield None
    elif not source.startswith("wandb:") and (path.suffix != ".ckpt" or path.is_dir()):
        yield ResumedRun(path)
    elif path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file():
        yield ResumedRun(path.parent.parent, path)
    else:
        from callbacks.resume import bring_run

        folder, brought = bring_run(source, Path("runs"), last_value(arguments, "name"))
        try:
            yield ResumedRun(folder, brought=brought)
        finally:
            if brought:
                shutil.rmtree(folder, ignore_errors=True)


def check_resumed(composed: ComposedConfig, resumed: ResumedRun) -> None:
    """Raise UserError for arguments that the resumed run could not follow."""
    config, saved = composed.values, composed.resumed or {}
    source = f"resume={config['resume']}"
    if config["task"] != "fit":
        raise UserError(f"{source} goes on with a training: task={config['task']} takes ckpt=FILE")
    for key in ("model", "data"):
        if config[key]["name"] != saved[key]["name"]:
            raise UserError(
                f"{source}: that run has {key}={saved[key]['name']}; "
                f"start a new one for {key}={config[key]['name']}"
            )
    for key in ("ckpt", "weights", "encoder_weights", "policy_weights"):
        if config[key] != saved.get(key):
            raise UserError(f"{key}= does not go with resume=, which has its own weights")
    reasons = {"name": "is its own", "groups": "is kept by group"}
    for key, reason in reasons.items():
        if config["optimizer"].get(key) != saved["optimizer"].get(key):
            raise UserError(
                f"{source}: optimizer.{key} cannot change, for the optimiser's state {reason}"
            )
    if not resumed.brought and config["name"] not in (saved["name"], resumed.folder.name):
        raise UserError(f"{source} goes on in its own folder, without name={config['name']}")


def choose_folder(config: dict[str, Any], resumed: ResumedRun | None) -> Path:
    """The run's folder, the same on all ranks; it is made once nothing can be refused any more.

    Raises:
        UserError: a run of that name exists, or its name would differ between processes.
    """
    if resumed is not None and not resumed.brought:
        return resumed.folder
    if "LOCAL_RANK" in os.environ and RUN_NAME in os.environ:
        return Path("runs") / os.environ[RUN_NAME]
    environment = os.environ
    processes = int(environment.get("WORLD_SIZE") or environment.get("SLURM_NTASKS") or 1)
    rank = int(environment.get("RANK") or environment.get("SLURM_PROCID") or 0)
    identity = time.strftime("%Y%m%d-%H%M%S") if processes == 1 else shared_identity()
    if config["name"] is None and identity is None:
        raise UserError(
            "name=NAME is needed where each process is started from outside; "
            "torchrun --rdzv_id=ID gives one, too"
        )
    default = f"{config['model']['name']}-{config['data']['name']}-{identity}"
    environment[RUN_NAME] = config["name"] or default
    folder = Path("runs") / environment[RUN_NAME]
    if rank == 0 and folder.exists():
        raise taken(folder)
    return folder


def shared_identity() -> str | None:
    """What all processes that torchrun or SLURM started know of each other; None without a job."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return os.environ.get("SLURM_JOB_ID") if launch == "none" else launch


def taken(folder: Path) -> UserError:
    """The error of a run whose folder is there already."""
    return UserError(f"{folder} exists: resume={folder} goes on with it, name= gives another")

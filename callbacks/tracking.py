"""Weights & Biases without surprises, and what a run folder says about its run.

Never prompts, and never stops a training: without an account or a network the run is kept offline.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from callbacks.jsonl import JsonLinesLogger
from segtrain.errors import UserError, did_you_mean, first_line
from segtrain.wandb_checkpoints import has_account

INIT_TIMEOUT = 30  # seconds to wait for the W&B server
FINISH_TIMEOUT = 60  # seconds; what is not sent by the end of the process is sent by wandb sync
MODES = ("auto", "online", "offline", "disabled")
PACKAGES = ("segtrain", "torch", "lightning", "torchmetrics", "albumentations", "numpy", "wandb")


def check_tracking(tracking: Mapping[str, Any]) -> None:
    """Raise UserError for what would be missed once the run has its folder."""
    wandb_mode(tracking["mode"])
    for name in tracking["loggers"]:
        if name not in _LOGGERS:
            raise UserError(
                f"tracking.loggers: there is no logger '{name}': {did_you_mean(name, _LOGGERS)}"
            )
        if name == "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError("tracking.loggers: no tensorboard here: uv sync --group tensorboard")


def create_loggers(
    tracking: Mapping[str, Any],
    run_folder: Path,
    record: Mapping[str, Any] | None,
    config: Mapping[str, Any],
) -> list[Logger]:
    """The loggers of a run: ``metrics.jsonl`` always, W&B unless disabled, others where asked for.

    Args:
        tracking: ``mode``, ``project``, ``entity``, ``group``, ``tags``, ``notes`` of W&B and
            ``loggers``, others by name. Mode ``auto`` follows the environment's ``WANDB_MODE``,
            else is online where an API key is configured and offline where not.
        run_folder: the run's folder; all loggers keep their files inside.
        record: what ``run.json`` says; W&B shows the run under its name and keeps its ``wandb_id``
            when the run is resumed. Ranks other than zero need none.
        config: the composed configuration, plain values; logged under the key ``cfg``, where it
            cannot collide with the keys of a W&B sweep.

    Raises:
        UserError: see `check_tracking`.
    """
    check_tracking(tracking)
    loggers: list[Logger] = [JsonLinesLogger(run_folder)]
    loggers += [_LOGGERS[name](run_folder) for name in tracking["loggers"]]
    mode = wandb_mode(tracking["mode"])
    if mode == "disabled":
        return loggers
    run = None
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        run = _start_wandb(mode, tracking, Path(run_folder), record or {}, config)
        if run is None:
            return loggers
    return [*loggers, _Wandb(project=tracking["project"], experiment=run)]


#: By name, what takes the same scalars as W&B.
_LOGGERS: dict[str, Callable[[Path], Logger]] = {
    # All event files in one folder are one run to TensorBoard.
    "tensorboard": lambda folder: TensorBoardLogger(folder, name="tensorboard", version=""),
    # A folder for each start, because the logger deletes the rows that it finds in its own. Its
    # rule for when to write looks at step + 1, which is never a multiple of 100.
    "csv": lambda folder: CSVLogger(folder, name="csv", flush_logs_every_n_steps=1),
}


class _Wandb(WandbLogger):
    """Lightning's logger, which a failing W&B does not let stop the training."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with wandb_errors_as_warnings("metrics"):
            super().log_metrics(metrics, step)


@contextlib.contextmanager
def wandb_errors_as_warnings(what: str) -> Iterator[None]:
    """Where W&B fails, say in one line what it has not got; the run folder has it."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"Weights & Biases: {what} not logged ({first_line(error)})", stacklevel=3)


def wandb_mode(mode: str) -> str:
    """Resolve a configured mode to online, offline or disabled.

    Raises:
        UserError: there is no such mode.
    """
    if mode not in MODES:
        raise UserError(f"tracking.mode: there is no mode '{mode}': {did_you_mean(mode, MODES)}")
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_account() else "offline")
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
        if mode not in MODES:
            raise UserError(f"WANDB_MODE: there is no mode '{mode}': {did_you_mean(mode, MODES)}")
    # Online without a key, W&B would ask on a terminal and wait.
    return "offline" if mode == "online" and not has_account() else mode


def _start_wandb(
    mode: str,
    tracking: Mapping[str, Any],
    run_folder: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Any:
    """The W&B run; None where there cannot be one."""
    # Inside the run folder, so that another machine with the same disk can send the run later.
    folder = run_folder / "wandb"
    os.environ.setdefault("WANDB_DATA_DIR", str(folder))
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "cache"))
    import wandb

    in_sweep = "WANDB_SWEEP_ID" in os.environ  # the agent has chosen the id
    arguments = {key: tracking[key] for key in ("project", "entity", "group", "tags", "notes")}
    about = {key: record[key] for key in _ABOUT if key in record}
    about |= record["resumed"][-1] if record.get("resumed") else {}
    arguments |= {"name": record.get("name"), "dir": str(run_folder)}
    arguments |= {"config": {"cfg": dict(config), "run": about}}
    arguments |= {} if in_sweep else {"id": record.get("wandb_id"), "resume": "allow"}
    # The progress bar would fill W&B's copy of the console.
    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, silent=True, console="off"
    )
    reason = "" if has_account() else " (no account configured)"
    run = None
    for attempt in dict.fromkeys([mode, "offline"]):
        try:
            folder.mkdir(exist_ok=True)  # or W&B would go elsewhere
            run = wandb.init(**arguments | {"mode": attempt}, settings=settings)
            break
        except Exception as error:
            reason = f" ({first_line(error)})"
            wandb.teardown()  # or the id would count as in use
    if run is None:
        print(f"Weights & Biases: left out{reason}")
        return None
    if run.offline:
        print(
            f"Weights & Biases: kept offline{reason}; to send it later: "
            f"wandb sync {run_folder}/wandb/offline-run-*"
        )
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run


def wandb_runs(trainer: Trainer) -> list[Any]:
    """The W&B runs to log charts and pictures to; none on ranks other than zero.

    Log with ``run.log({..., "trainer/global_step": trainer.global_step})``: never ``step=``, which
    W&B refuses to set back.
    """
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


#: What a run's record says about each start of it.
_ABOUT = ("command", "git_commit", "git_dirty", "versions", "devices")


def write_run_record(run_folder: Path, name: str, command: Sequence[str]) -> dict[str, Any]:
    """Write ``run.json`` when a run starts, or note in it that the run goes on.

    Args:
        run_folder: exists.
        name: of the run.
        command: the program and its arguments.

    Returns:
        The record: ``name``, ``wandb_id``, ``created`` (ISO 8601, UTC), ``command``,
        ``git_commit``, ``git_dirty``, ``versions``, ``devices`` (names of the GPUs). For each time
        that the run was resumed there is ``time`` and the last five once more in ``resumed``.
    """
    path = Path(run_folder) / "run.json"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    about = {
        "command": shlex.join(command),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "versions": _versions(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        record["resumed"] = [*record.get("resumed", []), {"time": now, **about}]
    else:
        wandb_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        record = {"name": name, "wandb_id": wandb_id, "created": now, **about}
    temporary = path.with_name(".run.json.writing")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return record


def _git(*arguments: str) -> str | None:
    """What git prints about the code that runs; None outside of a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda or "none"}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions

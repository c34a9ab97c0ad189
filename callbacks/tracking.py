"""Weights & Biases without surprises, and what a run folder says about its run.

Never prompts, and never stops a training: without an account or a network the run is kept offline.
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from callbacks.jsonl import JsonLinesLogger
from segtrain.errors import UserError, did_you_mean

INIT_TIMEOUT = 30  # seconds to wait for the W&B server
MODES = ("auto", "online", "offline", "disabled")
PACKAGES = ("segtrain", "torch", "lightning", "torchmetrics", "albumentations", "numpy", "wandb")


def create_loggers(
    tracking: Mapping[str, Any],
    run_folder: Path,
    run_name: str,
    wandb_id: str | None,
    config: Mapping[str, Any],
) -> list[Logger]:
    """The loggers of a run: ``metrics.jsonl`` always, W&B unless disabled.

    Args:
        tracking: ``mode``, ``project``, ``entity``, ``group``, ``tags``, ``notes``. Mode ``auto``
            follows the environment's ``WANDB_MODE``, else is online where an API key is configured
            and offline where not.
        run_folder: the run's folder; W&B keeps all its files inside.
        run_name: shown by W&B.
        wandb_id: id of the W&B run, the same when a run is resumed.
        config: the composed configuration, plain values; logged under the key ``cfg``, where it
            cannot collide with the keys of a W&B sweep.

    Raises:
        UserError: there is no such mode.
    """
    loggers: list[Logger] = [JsonLinesLogger(run_folder)]
    mode = wandb_mode(tracking["mode"])
    if mode != "disabled":
        run = None
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            run = _start_wandb(mode, tracking, Path(run_folder), run_name, wandb_id, config)
        loggers.append(WandbLogger(project=tracking["project"], experiment=run))
    return loggers


def wandb_mode(mode: str) -> str:
    """Resolve a configured mode to online, offline or disabled.

    Raises:
        UserError: there is no such mode.
    """
    if mode not in MODES:
        raise UserError(f"tracking.mode: there is no mode '{mode}': {did_you_mean(mode, MODES)}")
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
        if mode not in MODES:
            raise UserError(f"WANDB_MODE: there is no mode '{mode}': {did_you_mean(mode, MODES)}")
    # Online without a key, W&B would ask on a terminal and wait.
    return "offline" if mode == "online" and not _has_key() else mode


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(candidate).expanduser() for candidate in candidates if candidate):
        try:
            return netrc.netrc(path).authenticators(host) is not None
        except FileNotFoundError:
            continue
        except (netrc.NetrcParseError, OSError):
            return False
    return False


def _start_wandb(
    mode: str,
    tracking: Mapping[str, Any],
    run_folder: Path,
    run_name: str,
    wandb_id: str | None,
    config: Mapping[str, Any],
) -> Any:
    # Inside the run folder, so that copying it is enough to send the run from another machine.
    os.environ.setdefault("WANDB_DATA_DIR", str(run_folder / "wandb"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(run_folder / "wandb" / "cache"))
    import wandb

    in_sweep = "WANDB_SWEEP_ID" in os.environ  # the agent has chosen the id
    arguments = {key: tracking[key] for key in ("project", "entity", "group", "tags", "notes")}
    arguments |= {"name": run_name, "dir": str(run_folder), "config": {"cfg": dict(config)}}
    arguments |= {} if in_sweep else {"id": wandb_id, "resume": "allow"}
    # The progress bar would fill W&B's copy of the console.
    settings = wandb.Settings(init_timeout=INIT_TIMEOUT, silent=True, console="off")
    reason = "" if _has_key() else " (no account configured)"
    if mode == "online":
        try:
            run = wandb.init(**arguments, mode="online", settings=settings)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            reason = f" ({str(error).strip().splitlines()[0]})"
            mode = "offline"
            wandb.teardown()  # or the id would count as in use
    if mode == "offline":
        run = wandb.init(**arguments, mode="offline", settings=settings)
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


def write_run_record(run_folder: Path, name: str, command: Sequence[str]) -> dict[str, Any]:
    """Write ``run.json`` when a run starts, or note in it that the run goes on.

    Args:
        run_folder: exists.
        name: of the run.
        command: the program and its arguments.

    Returns:
        The record: ``name``, ``wandb_id``, ``git_commit``, ``git_dirty``, ``versions``,
        ``command``, ``created`` (ISO 8601, UTC) and, for each time that the run was resumed,
        ``command``, ``git_commit`` and ``time`` in ``resumed``.
    """
    path = Path(run_folder) / "run.json"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    commit = _git("rev-parse", "HEAD")
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        again = {"time": now, "command": shlex.join(command), "git_commit": commit}
        record["resumed"] = [*record.get("resumed", []), again]
    else:
        record = {
            "name": name,
            "wandb_id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
            "git_commit": commit,
            "git_dirty": bool(_git("status", "--porcelain")),
            "versions": _versions(),
            "command": shlex.join(command),
            "created": now,
        }
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
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions

"""Checkpoints that Weights & Biases keeps of runs: where they are, and how they come here."""

from __future__ import annotations

import importlib
import netrc
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from segtrain.errors import UserError, first_line

WANDB = "wandb:"
CHECKPOINT = "checkpoint.ckpt"  # in an artifact
_ADDRESS = re.compile(r"wandb:([^/:]+)/([^/:]+)/([^/:]+)(?::([^/:]+))?")
_TIMEOUT = 30  # seconds to wait for the server


@dataclass(frozen=True)
class Address:
    """``wandb:ENTITY/PROJECT/RUN_ID[:alias]``."""

    entity: str
    project: str
    run_id: str
    alias: str | None = None

    @property
    def artifact(self) -> str:
        """The artifact that holds the run's checkpoints."""
        return f"{self.entity}/{self.project}/checkpoint-{self.run_id}"


def parse_address(source: str, shown: str) -> Address:
    """The parts of an address; `shown` starts the message of the error.

    Raises:
        UserError: it is not written so.
    """
    match = _ADDRESS.fullmatch(source)
    if match is None:
        raise UserError(f"{shown}: write wandb:entity/project/RUN_ID[:alias]")
    return Address(*match.groups())


def has_account() -> bool:
    """Whether a key for the server is configured; without one, W&B would ask on a terminal."""
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


def download_files(
    address: Address, folder: Path, names: Iterable[str], shown: str, timeout: int = _TIMEOUT
) -> None:
    """Fetch files of a run's artifact, of those that are in it; the checkpoint has to be.

    Args:
        address: of the run; without an alias, its latest checkpoint.
        folder: where the files go.
        names: of the files.
        shown: starts the messages of errors.
        timeout: seconds to wait for the server.

    Raises:
        UserError: there is no account, no way to the server, or no such run or alias.
    """
    artifact = _find_artifact(address, [address.alias or "latest"], shown, timeout)
    _download(artifact, folder, names, shown)


def fetch_checkpoint(address: Address, aliases: Iterable[str]) -> Path:
    """A run's checkpoint in the cache, ``segtrain`` in torch.hub's folder: downloaded once.

    Args:
        address: of the run.
        aliases: where the address has none, the first of these that there is.

    Raises:
        UserError: see `download_files`.
    """
    shown = f"{WANDB}{address.entity}/{address.project}/{address.run_id}"
    wanted = [address.alias] if address.alias else list(aliases)
    artifact = _find_artifact(address, wanted, shown, _TIMEOUT)
    # A version never changes.
    folder = Path(torch.hub.get_dir()) / "segtrain" / address.artifact / str(artifact.version)
    if not (folder / CHECKPOINT).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".bringing-", dir=folder.parent))
        try:
            _download(artifact, temporary, [CHECKPOINT], shown)
            temporary.chmod(0o755)  # mkdtemp's is for the owner alone
            temporary.rename(folder)
        except OSError:
            if not (folder / CHECKPOINT).is_file():  # brought by another process meanwhile
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder / CHECKPOINT


def _wandb() -> Any:
    # The library does without W&B, and so does whoever installs it.
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "checkpoints in Weights & Biases need its package: pip install wandb"
        ) from None


def _find_artifact(address: Address, aliases: list[str], shown: str, timeout: int) -> Any:
    if not has_account():
        raise UserError(f"{shown}: no account configured: set WANDB_API_KEY, wandb login")
    wandb = _wandb()
    name = address.artifact
    try:
        api = wandb.Api(timeout=timeout)
        for alias in aliases:
            if api.artifact_exists(f"{name}:{alias}", "model"):
                return api.artifact(f"{name}:{alias}", "model")
        known = api.artifact_collection_exists(name, "model")
    except (wandb.errors.Error, OSError) as error:
        raise UserError(f"{shown}: Weights & Biases says: {first_line(error)}") from error
    if not known:
        raise UserError(
            f"{shown}: {address.entity}/{address.project} has no checkpoint of a run "
            f"{address.run_id}"
        )
    raise UserError(
        f"{shown}: that run has no checkpoint '{aliases[0]}': there is latest, best and step-N for "
        "the steps that were kept"
    )


def _download(artifact: Any, folder: Path, names: Iterable[str], shown: str) -> None:
    wandb = _wandb()
    present = artifact.manifest.entries
    try:
        # These alone: a file of another name has no business there.
        for name in [name for name in names if name in present]:
            artifact.get_entry(name).download(str(folder), skip_cache=True)
    except (wandb.errors.Error, OSError) as error:
        raise UserError(f"{shown}: Weights & Biases says: {first_line(error)}") from error
    if not (folder / CHECKPOINT).is_file():
        raise UserError(f"{shown}: what W&B keeps there holds no {CHECKPOINT}")

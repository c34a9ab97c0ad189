"""Checkpoints of runs as what comes after the training reads them."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from segtrain.errors import UserError
from segtrain.wandb_checkpoints import WANDB, fetch_checkpoint, parse_address

#: What the label maps of a network depend on.
_SECTIONS = ("model", "data", "inference")


def find_checkpoint(source: str | Path, checkpoint: str = "best") -> Path:
    """The file that a run's folder, a run in Weights & Biases, or a path to it, stands for.

    Args:
        source: ``runs/NAME``, ``FILE.ckpt`` or ``wandb:entity/project/RUN_ID[:alias]``; that of
            W&B is downloaded once, into torch.hub's folder.
        checkpoint: which of a run's: ``best``, or ``last`` where there is no best, ``last``, ...

    Raises:
        UserError: there is none, or W&B cannot be asked.
    """
    if str(source).startswith(WANDB):
        latest = {"last": ["latest"], "best": ["best", "latest"]}
        address = parse_address(str(source), str(source))
        return fetch_checkpoint(address, latest.get(checkpoint, [checkpoint]))
    source = Path(source).expanduser()
    if source.is_file():
        return source
    if not source.exists():
        raise UserError(f"{source}: there is no such file or folder")
    folder = source / "checkpoints"
    names = sorted(file.stem for file in folder.glob("*.ckpt"))
    if not names:
        raise UserError(f"{source} is no run's folder: it has no checkpoints/*.ckpt")
    if checkpoint == "best" and "best" not in names and "last" in names:
        checkpoint = "last"
    if checkpoint not in names:
        raise UserError(f"{source} has no checkpoint '{checkpoint}', but: {', '.join(names)}")
    return folder / f"{checkpoint}.ckpt"


def read_checkpoint(path: Path, check: bool = True) -> dict[str, Any]:
    """A checkpoint's content, its tensors left on the disk.

    Args:
        path: of the file.
        check: whether to read it through for damage.

    Raises:
        UserError: it is damaged, holds code, or is not one of a run.
    """
    reason = damage(path) if check else None
    if reason is not None:
        raise UserError(f"{path} is no whole checkpoint ({reason})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors and plain values, which could run code: refused"
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError, OSError):
        raise UserError(f"{path} is no checkpoint of a run") from None
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or not all(isinstance(config.get(k), dict) for k in _SECTIONS):
        raise UserError(
            f"{path} is no checkpoint of a run: it has no configuration; weights of others are "
            "loaded by create_network and load_weights, or weights=FILE on the command line"
        )
    return content


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by the checksums that torch.save writes; None if nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
            if record is not None:
                return f"wrong checksum of {record}"
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "not a checkpoint"
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, zlib.error):
        return "empty" if path.stat().st_size == 0 else "cut off, overwritten or another file"
    except OSError as error:
        return error.strerror or str(error)
    return None

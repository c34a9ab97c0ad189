"""Weights from files, without ever running code that a file holds."""

from __future__ import annotations

import pickletools
import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from segtrain.errors import UserError

# What OpenMMLab's files hold beside their weights (versions, log history): read as blanks.
_INERT_PACKAGES = ("mmcv", "mmengine", "mmseg", "mmcls", "mmpretrain", "numpy", "_codecs")
_WRAPPERS = ("state_dict", "model")


class _Blank:
    """Stands for an object of a package above: takes whatever the file gives, keeps nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Blank:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_weights(path: Path) -> dict[str, Tensor]:
    """Parameter name -> tensor on the CPU, as the file has them but for wrappers and prefixes.

    Reads safetensors and whatever ``torch.save`` wrote: a bare state dict, OpenMMLab's
    ``{meta, state_dict, optimizer}``, a checkpoint of ours (the network's part of it).

    Raises:
        UserError: there is no such file, it is damaged, it is no checkpoint, or it holds code.
    """
    if not path.is_file():
        found = "a folder, not a checkpoint file" if path.is_dir() else "not there"
        raise UserError(f"weights {path}: {found}")
    with path.open("rb") as file:
        start = file.read(9)
    # safetensors: the length of a JSON header, then the header.
    content = _read_safetensors(path) if start[8:] == b"{" else _read_torch(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    weights = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not weights:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else str(type(content))
        raise UserError(f"weights {path}: holds no parameters, but: {found or 'nothing'}")
    # A LightningModule keeps its network beside other things.
    network = {key: value for key, value in weights.items() if key.startswith("network.")}
    prefix = "network." if network else "module."
    return {key.removeprefix(prefix): value for key, value in (network or weights).items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise _damaged(path) from error


def _read_torch(path: Path) -> Any:
    blanks: list[Any] = []
    while True:
        try:
            with torch.serialization.safe_globals(blanks), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols; the error says enough
                return torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            refused = re.search(r"GLOBAL (\S+)", str(error))
            name = refused[1] if refused else _first_foreign_global(path)
            if name is None:
                raise _damaged(path) from error
            if name.split(".")[0] not in _INERT_PACKAGES or (_Blank, name) in blanks:
                raise UserError(
                    f"weights {path}: holds code ({name}), which is refused and was not run; "
                    "save the bare state dict to load it"
                ) from error
            blanks.append((_Blank, name))
        except (EOFError, RuntimeError, ValueError, OSError, KeyError, AttributeError) as error:
            raise _damaged(path) from error


def _first_foreign_global(path: Path) -> str | None:
    """The first thing outside torch that a plain pickle, of whatever protocol, would import."""
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, value, _ in pickletools.genops(file):
                name = None
                if opcode.name == "GLOBAL":
                    name = str(value).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    name = ".".join(strings[-2:])
                elif isinstance(value, str):
                    strings.append(value)
                if name and name.split(".")[0] not in ("torch", "collections"):
                    return name
    except (ValueError, EOFError):  # not a pickle, or cut short
        pass
    return None


def _damaged(path: Path) -> UserError:
    return UserError(
        f"weights {path}: cannot be read as a checkpoint ({path.stat().st_size} bytes): "
        "cut short, damaged, or another kind of file"
    )

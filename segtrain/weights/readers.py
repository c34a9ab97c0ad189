"""Weights from files, without ever running code that a file holds."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from segtrain.errors import UserError
from segtrain.weights.paddle import unpickle_arrays

# What OpenMMLab's files hold beside their weights (versions, log history): read as blanks.
_INERT_PACKAGES = ("mmcv", "mmengine", "mmseg", "mmcls", "mmpretrain", "numpy", "_codecs")
# The number that a file of torch's former format, which is several pickles, begins with.
_TORCH_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
_WRAPPERS = ("state_dict", "model")
# What a Hugging Face folder may hold, in the order in which transformers looks for it.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


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
    ``{meta, state_dict, optimizer}``, detectron2's ``{model, optimizer, iteration}``, a checkpoint
    of ours (the network's part of it). Of Paddle, a ``.pdparams`` file or a zip with one in it; of
    detectron2, a ``.pkl`` file with arrays. A Hugging Face folder stands for the weights in it, be
    they in one file or in several with an index.

    Raises:
        UserError: there is no such file, it is damaged, it is no checkpoint, or it holds code.
    """
    if not path.is_dir():
        return _read_file(path)
    for name in _FOLDER_FILES:
        file = path / name
        if file.is_file():
            parts = _read_index(file) if name.endswith(".json") else [file]
            return {key: value for part in parts for key, value in _read_file(part).items()}
    raise UserError(f"weights {path}: a folder without weights, has none of {_folder_files()}")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a Hugging Face folder's ``config.json``.

    Raises:
        UserError: there is none, it is damaged, or it names no ``model_type``.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"weights {folder}: a folder without config.json, which a Hugging Face folder holds "
            f"beside one of {_folder_files()}; of another folder, give the file"
        )
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"weights {path}: names no model_type, as a Hugging Face config.json does")
    return config


def _read_index(path: Path) -> list[Path]:
    """The files that an index spreads a model's weights over."""
    parts = _read_json(path).get("weight_map")
    names = list(parts.values()) if isinstance(parts, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"weights {path}: has no weight_map from parameters to files")
    for name in names:
        if re.search(r"[/\\\0]", name) or name in ("", ".", ".."):
            raise UserError(f"weights {path}: names a file outside its folder ({name!r}), refused")
    return [path.parent / name for name in sorted(set(names))]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"weights {path}: is not valid JSON: cut short or damaged") from error
    if not isinstance(content, dict):
        raise UserError(f"weights {path}: holds no JSON object")
    return content


def _folder_files() -> str:
    return ", ".join(_FOLDER_FILES)


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"weights {path}: not there")
    content = _read_content(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    weights = (
        {
            key: value
            for key, value in content.items()
            if isinstance(key, str) and isinstance(value, Tensor)
        }
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


def _read_content(path: Path) -> Any:
    """What a file holds, which its first bytes tell the kind of."""
    with path.open("rb") as file:
        start = file.read(32)
    if start[8:9] == b"{":  # after the length of a JSON header
        return _read_safetensors(path)
    arrays = None
    if start.startswith(b"PK"):
        arrays = _paddle_file_in_zip(path)
    elif start.startswith(b"\x80") and _TORCH_MAGIC not in start:  # a pickle, not one of torch's
        arrays = path.read_bytes()
    return _read_torch(path) if arrays is None else _read_arrays(path, arrays)


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
            name = _foreign_global(error)
            if name.split(".")[0] not in _INERT_PACKAGES or (_Blank, name) in blanks:
                raise _refused(path, error) from error
            blanks.append((_Blank, name))
        except (EOFError, RuntimeError, ValueError, OSError, KeyError, AttributeError) as error:
            raise _damaged(path) from error


def _read_arrays(path: Path, content: bytes) -> Any:
    try:
        return unpickle_arrays(content)
    except UnpicklingError as error:
        raise _refused(path, error) from error


def _paddle_file_in_zip(path: Path) -> bytes | None:
    """The file of Paddle's that a zip holds, None if the zip is one of torch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".pdparams")]
            if len(names) < 2:
                return archive.read(names[0]) if names else None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise _damaged(path) from error
    raise UserError(f"weights {path}: holds {len(names)} .pdparams files: unpack the one to load")


def _foreign_global(error: UnpicklingError) -> str:
    """What an unpickler refused to import; empty if it failed otherwise."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    return refused[1] if refused else ""


def _refused(path: Path, error: UnpicklingError) -> UserError:
    name = _foreign_global(error)
    if not name:
        return _damaged(path)
    return UserError(
        f"weights {path}: holds code ({name}), which is refused and was not run; "
        "save the bare state dict to load it"
    )


def _damaged(path: Path) -> UserError:
    return UserError(
        f"weights {path}: cannot be read as a checkpoint ({path.stat().st_size} bytes): "
        "cut short, damaged, or another kind of file"
    )

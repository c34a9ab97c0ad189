"""Label maps and overlays as files that are whole or not there, of one network in a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from prediction.inputs import Item
from segtrain.errors import UserError
from segtrain.trained import TrainedNetwork

RECORD = "predict.json"
_QUALITY = 90  # of overlays
_WRITING = ".writing-"


class Output:
    """The folder of the results.

    Files are written in a folder of this process and moved from there to their places, so that a
    process that is killed leaves no part of one, and two at a time do not spoil each other's.

    Args:
        folder: is made.
        trained: the network that labels.
        overlay: opacity of the classes' colours on the picture; None writes no overlays.
    """

    def __init__(self, folder: Path, trained: TrainedNetwork, overlay: float | None) -> None:
        self.folder = folder
        self.trained = trained
        self.overlay = overlay
        self._own = f"{_WRITING}{socket.gethostname()}-{os.getpid()}"

    def open(self, items: Iterable[Item], record: dict[str, Any], overwrite: bool) -> None:
        """Make the folder; `record` says in its ``predict.json`` what the results are of.

        Raises:
            UserError: results are there that are not of this network, or cannot be written.
        """
        file = self.folder / RECORD
        self.prepare()
        try:
            if overwrite:
                for item in items:
                    item.mask.unlink(missing_ok=True)
                    item.overlay.unlink(missing_ok=True)
            elif file.exists():
                self._check_same(file, record)
            else:
                self._check_empty(items)
            self._place(file, (json.dumps(record, indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"output={self.folder}: {error.strerror or error}") from error

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            (self.folder / self._own).mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"output={self.folder}: {error.strerror or error}") from error

    def close(self) -> None:
        """Leave nothing but results."""
        shutil.rmtree(self.folder / self._own, ignore_errors=True)

    def write(self, item: Item, image: np.ndarray, classes: np.ndarray) -> None:
        """The overlay, and then the label map, of one picture.

        Args:
            item: where to.
            image: (H, W, 3) uint8 RGB.
            classes: (H, W).
        """
        if self.overlay is not None:
            colored = blend(image, self.trained.color(classes), self.overlay)
            self._place(item.overlay, _jpeg(colored))
        self._place(item.mask, index_png(classes, self.trained.classes.palette))

    def file_in_progress(self, name: str) -> Path:
        """Where a file is written that `finish` then gives its place."""
        return self.folder / self._own / name

    def finish(self, temporary: Path, path: Path) -> None:
        """Move a file that is whole to its place."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(path)

    def _place(self, path: Path, content: bytes) -> None:
        # Its own name among those that other threads write.
        name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        temporary = self.file_in_progress(name)
        temporary.write_bytes(content)
        self.finish(temporary, path)

    def _remove_abandoned(self) -> None:
        """Remove what processes of this machine left that were killed."""
        for folder in self.folder.glob(f"{_WRITING}{socket.gethostname()}-*"):
            process = folder.name.rpartition("-")[2]
            if process.isdigit() and not _is_running(int(process)):
                shutil.rmtree(folder, ignore_errors=True)

    def _check_same(self, file: Path, record: dict[str, Any]) -> None:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        for key, value in record["results"].items():
            there = before.get("results", {}).get(key)
            if there != value:
                raise UserError(
                    f"output={self.folder} holds results of another {key} ({before.get('source')}, "
                    f"{key} {_short(there)}, not {_short(value)}): choose another folder, or "
                    "overwrite=true"
                )

    def _check_empty(self, items: Iterable[Item]) -> None:
        for item in items:
            for path in (item.mask, item.overlay):
                if path.exists():
                    raise UserError(
                        f"{path} is there, and output={self.folder} has no {RECORD}, so it is "
                        "somebody else's: choose another folder, or overwrite=true"
                    )


def describe_results(trained: TrainedNetwork, source: str) -> dict[str, Any]:
    """What label maps depend on, and where it is from: the content of ``predict.json``."""
    inference, setting = trained.inference, trained.network.setting
    values = {"name": setting.name} | setting.values
    record = {
        "source": source,
        "step": trained.step,
        "network": (trained.config.get("model") or {}).get("name"),
        "classes": list(trained.classes.names),
        "results": {
            "weights": _digest(trained.network),
            "setting": values,
            "inference": dataclasses.asdict(inference),
            "eval_scale": trained.eval_scale,
            "size_divisor": trained.size_divisor,
        },
    }
    return json.loads(json.dumps(record, default=str))  # as it is read again


def index_png(classes: np.ndarray, palette: Iterable[tuple[int, int, int]]) -> bytes:
    """A PNG of the classes' numbers: 8 bits with a palette, 16 without one for more than 256.

    Args:
        classes: (H, W).
        palette: colours of all classes.
    """
    colors = list(palette)
    if len(colors) > 256:
        image = Image.fromarray(classes.astype(np.uint16))
    else:
        image = Image.fromarray(classes.astype(np.uint8))
        image.putpalette([part for color in colors for part in color])
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)
    return file.getvalue()


def blend(image: np.ndarray, colors: np.ndarray, opacity: float) -> np.ndarray:
    """(H, W, 3) uint8: colours laid on a picture."""
    return cv2.addWeighted(image, 1 - opacity, colors, opacity, 0)


def _jpeg(image: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(image, quality=_QUALITY, colorsubsampling="420")


def _digest(network: torch.nn.Module) -> str:
    """The same for the same weights alone."""
    total = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        total.update(name.encode())
        total.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def _is_running(process: int) -> bool:
    with contextlib.suppress(PermissionError):  # of somebody else
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True


def _short(value: Any) -> str:
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(value)

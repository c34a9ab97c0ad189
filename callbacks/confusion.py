"""Which classes are taken for which, in the newest validation: ``confusion.npz`` of a run."""

from __future__ import annotations

import base64
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CONFUSION = "confusion.npz"

#: A page shows the matrix of at most so many classes, those with the most pixels taken wrong.
SHOWN_CLASSES = 256


@dataclass(frozen=True)
class Confusion:
    """Counts of pixels.

    Attributes:
        step: of the validation.
        settings: names of the S settings.
        classes: names of the K classes.
        counts: (S, K, K) int64, rows are labels, columns predictions.
    """

    step: int
    settings: Sequence[str]
    classes: Sequence[str]
    counts: np.ndarray


def write_confusion(path: Path, confusion: Confusion) -> None:
    """Replace the file; who reads it meanwhile sees the one before or this one."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            step=confusion.step,
            settings=np.array(confusion.settings, dtype=str),
            classes=np.array(confusion.classes, dtype=str),
            counts=confusion.counts,
        )
    temporary.replace(path)


def read_confusion(path: Path) -> Confusion | None:
    """What :func:`write_confusion` wrote; None if there is nothing, or no whole file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Confusion(
                int(file["step"]),
                file["settings"].tolist(),
                file["classes"].tolist(),
                file["counts"],
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def page_confusion(confusion: Confusion) -> dict[str, Any]:
    """What a page draws: for every setting and label the shares of its pixels, in 1 / 65535.

    The shares are uint16, the high bytes of all before the low ones, as base64 of zlib: most are
    small, and high bytes of zero take no room.
    """
    counts = confusion.counts
    shown = np.arange(len(confusion.classes))
    if len(shown) > SHOWN_CLASSES:
        totals = counts.sum(axis=0)
        wrong = totals.sum(axis=0) + totals.sum(axis=1) - 2 * totals.diagonal()
        shown = np.sort(np.argsort(-wrong, kind="stable")[:SHOWN_CLASSES])
    labelled = counts[0].sum(axis=1)
    shares = counts[:, shown[:, None], shown] / np.maximum(labelled[shown], 1)[None, :, None]
    levels = np.round(shares * 65535).astype(np.uint16)
    planes = (levels >> 8).astype(np.uint8).tobytes() + (levels & 255).astype(np.uint8).tobytes()
    return {
        "step": confusion.step,
        "settings": list(confusion.settings),
        "classes": [confusion.classes[index] for index in shown.tolist()],
        "all_classes": len(confusion.classes),
        "labelled": labelled[shown].tolist(),
        "pixels": int(labelled.sum()),
        "shares": base64.b64encode(zlib.compress(planes, 9)).decode(),
    }

"""The classes of each data set, and the one table that turns its raw label ids into train ids."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from segtrain.errors import UserError

IGNORE_INDEX = 255
# Stands in `raw_to_train` for raw ids that no file of the data set holds. No table has 254 classes.
_NOT_ALLOWED = 254


@dataclass(frozen=True, eq=False)
class ClassTable:
    """What a data set calls its classes and how its label files number them.

    Attributes:
        class_names: K names, in the order of the train ids 0..K-1.
        palette: (K, 3) uint8 RGB.
        raw_ids: the ids that label files may hold, in words.
        raw_to_train: (256,) uint8, raw id -> train id or 255 (ignored).
        raw_colors: (N, 3) uint8 RGB of the raw ids 0..N-1 where label files show colours instead.
    """

    class_names: tuple[str, ...]
    palette: np.ndarray
    raw_ids: str
    raw_to_train: np.ndarray
    raw_colors: np.ndarray | None = None

    @property
    def allowed(self) -> np.ndarray:
        """(256,) bool, whether label files may hold a raw id."""
        return self.raw_to_train != _NOT_ALLOWED

    def to_train_ids(self, raw: np.ndarray, where: str) -> np.ndarray:
        """Turn a raw label map (H, W) uint8 into train ids (H, W) uint8.

        Raises:
            UserError: an id is outside the table; `where` names the file.
        """
        mask = cv2.LUT(raw, self.raw_to_train)  # a fifth of the time of NumPy's indexing
        if (mask == _NOT_ALLOWED).any():
            unknown = np.unique(raw[mask == _NOT_ALLOWED])
            listed = ", ".join(map(str, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
            raise UserError(
                f"{where}: label ids {listed} are outside the table; allowed are {self.raw_ids}."
                " Put back the label files as distributed: already converted ones (shifted by one,"
                " labelTrainIds) or those of another data set do not fit"
            )
        return mask

    def for_converted_labels(self, ignored: int = IGNORE_INDEX) -> ClassTable:
        """The table for label files that hold train ids already, and `ignored` elsewhere."""
        raw_to_train = np.full(256, _NOT_ALLOWED, dtype=np.uint8)
        classes = len(self.class_names)
        raw_to_train[:classes] = np.arange(classes)
        raw_to_train[ignored] = IGNORE_INDEX
        raw_ids = f"0 to {classes - 1} and {ignored} (converted labels)"
        return replace(self, raw_ids=raw_ids, raw_to_train=raw_to_train, raw_colors=None)


def load_class_table(name: str) -> ClassTable:
    """The table in `classes/<name>.json`."""
    content = json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))
    raw_colors = content.get("raw_colors")
    raw_to_train = [_NOT_ALLOWED if i is None else i for i in content["raw_to_train"]]
    return ClassTable(
        class_names=tuple(c["name"] for c in content["classes"]),
        palette=np.array([c["color"] for c in content["classes"]], dtype=np.uint8),
        raw_ids=content["raw_ids"],
        raw_to_train=np.array(raw_to_train, dtype=np.uint8),
        raw_colors=None if raw_colors is None else np.array(raw_colors, dtype=np.uint8),
    )

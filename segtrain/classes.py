"""What the numbers in label maps mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        names: of the K classes.
        palette: K colours, red, green and blue from 0 to 255.
        ignore_index: the number of pixels that are of no class.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = 255

    @property
    def values(self) -> dict[str, Any]:
        """Plain types, as checkpoints hold them."""
        return {
            "names": list(self.names),
            "palette": [list(color) for color in self.palette],
            "ignore_index": self.ignore_index,
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Classes:
        """The reverse of `values`."""
        palette = tuple((int(r), int(g), int(b)) for r, g, b in values["palette"])
        return cls(tuple(values["names"]), palette, int(values["ignore_index"]))

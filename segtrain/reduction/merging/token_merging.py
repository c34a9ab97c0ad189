"""One choice of merging, as a setting holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from segtrain.errors import UserError, did_you_mean
from segtrain.reduction.merging.bipartite import match_bipartite
from segtrain.reduction.merging.neighbours import match_runs, match_windows
from segtrain.reduction.merging.pair import Grid, Pair

#: mode -> what it needs beside it.
MODES = {"bsm": ("ratio", "stride"), "n1d": ("stride",), "n2d": ("stride",)}


@dataclass(frozen=True)
class TokenMerging:
    """How the tokens of a grid are merged.

    Attributes:
        mode: ``bsm`` merges tokens that resemble each other (``match_bipartite``), ``n2d`` the
            windows of the grid (``match_windows``), ``n1d`` runs along the flattened grid
            (``match_runs``).
        stride: (vertical, horizontal) size of a window; for ``n1d`` (the length of a run,).
        ratio: the share of all tokens that ``bsm`` removes, rounded down to whole tokens; the
            corner tokens of the windows always stay.
    """

    mode: str
    stride: tuple[int, ...]
    ratio: float | None = None

    def __post_init__(self) -> None:
        numbers = 1 if self.mode == "n1d" else 2
        if len(self.stride) != numbers or not all(type(n) is int and n > 0 for n in self.stride):
            wanted = "a whole number" if numbers == 1 else "two whole numbers (down, across)"
            raise UserError(
                f"'stride' of merging '{self.mode}' is {wanted} above 0, not {list(self.stride)}"
            )
        ratio = self.ratio
        if ratio is not None and (type(ratio) not in (int, float) or not 0 <= ratio <= 1):
            raise UserError(f"'ratio' of merging is a number from 0 to 1, not {ratio!r}")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Build it from plain values, such as ``{"mode": "bsm", "ratio": 0.6, "stride": [2, 2]}``.

        One number as ``stride`` stands for both directions.

        Raises:
            UserError: the mode is unknown, or does not go with what stands beside it.
        """
        if not isinstance(values, Mapping) or "mode" not in values:
            raise UserError(f"merging needs a 'mode', one of {', '.join(MODES)}; got {values}")
        mode = values["mode"]
        if mode not in MODES:
            raise UserError(f"there is no merging mode '{mode}': {did_you_mean(str(mode), MODES)}")
        needed = MODES[mode]
        for key in values:
            if key not in needed and key != "mode":
                suggestion = did_you_mean(key, needed)
                raise UserError(f"merging '{mode}' has no field '{key}': {suggestion}")
        missing = [key for key in needed if key not in values]
        if missing:
            raise UserError(f"merging '{mode}' needs {' and '.join(missing)}")
        stride = values["stride"]
        if not isinstance(stride, list | tuple):
            stride = [stride] * (1 if mode == "n1d" else 2)
        return cls(mode, tuple(stride), values.get("ratio"))

    @property
    def values(self) -> dict[str, Any]:
        """The plain values that it can be built from."""
        values: dict[str, Any] = {"mode": self.mode, "stride": list(self.stride)}
        return values if self.ratio is None else values | {"ratio": self.ratio}

    def match(self, tokens: Tensor, grid: Grid) -> Pair:
        """``(merge, unmerge)`` for tokens (B, h*w, C) of a grid (h, w)."""
        if self.mode == "n1d":
            return match_runs(tokens.shape[1], self.stride[0])
        window = (self.stride[0], self.stride[1])
        if self.mode == "n2d":
            return match_windows(grid, window)
        return match_bipartite(tokens, grid, window, int(tokens.shape[1] * (self.ratio or 0)))

"""Token merging: in every block the tokens that resemble another most become one with it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from segtrain.errors import UserError
from segtrain.reduction.plain.alternate import Alternation
from segtrain.reduction.plain.level import Grid
from segtrain.reduction.plain.merged import MergedTokens


@dataclass(frozen=True)
class ToMe:
    """Bipartite matching between attention and MLP of every block (ToMe, 2210.09461, section 3).

    Tokens are compared by their keys, the mean over the heads; every other one may merge into one
    of the rest, so that at most half of them go in a block, and one is always left. Sizes weigh
    the means, and attention.

    Attributes:
        ratio: the share of the patches at hand that merges in each block, rounded down to whole
            ones: one number, or one for each block.
        removed: instead of it, how many merge in each block: one number, or one for each block.
        proportional: whether log(size) is added to what attention compares (equation 1).
    """

    main: ClassVar[str] = "ratio"

    ratio: float | tuple[float, ...] | None = None
    removed: int | tuple[int, ...] | None = None
    proportional: bool = True

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.removed is None):
            raise UserError("'tome' of a setting has either 'ratio' or 'removed'")
        for ratio in _listed(self.ratio):
            if type(ratio) not in (int, float) or not 0 <= ratio <= 0.5:
                raise UserError(
                    "'ratio' of 'tome' is a number from 0 to 0.5 (every other token), or a list of "
                    f"them, one for each block; not {self.ratio!r}"
                )
        for removed in _listed(self.removed):
            if type(removed) is not int or removed < 0:
                raise UserError(
                    "'removed' of 'tome' is a whole number from 0, or a list of them, one for each "
                    f"block; not {self.removed!r}"
                )
        if type(self.proportional) is not bool:
            raise UserError(f"'proportional' of 'tome' is true or false, not {self.proportional!r}")

    def check(self, depth: int) -> None:
        """Raise UserError if it does not fit that many blocks."""
        for name, schedule in (("ratio", self.ratio), ("removed", self.removed)):
            if isinstance(schedule, tuple) and len(schedule) != depth:
                raise UserError(
                    f"'{name}' of 'tome' lists {len(schedule)} blocks, the encoder has {depth}"
                )

    def describe(self) -> str:
        """Its amount, such as ``0.05``, or ``13_tokens``."""
        amount = "_".join(map(str, _listed(self.ratio)))
        return amount or "_".join(map(str, _listed(self.removed))) + "_tokens"

    def blocks(self, depth: int) -> Collection[int]:
        """All of them."""
        return range(depth)

    def match(
        self, block: int, tokens: MergedTokens, keys: Tensor, grid: Grid
    ) -> tuple[Tensor, int] | None:
        """Slots for the nearest tokens of this block's share; see `Merging`."""
        metric = keys[:, tokens.num_prefix :]
        removed = self._removed(block, metric.shape[1])
        return Alternation(metric, tokens.num_prefix).merge(removed) if removed else None

    def _removed(self, block: int, length: int) -> int:
        if self.removed is not None:
            return self.removed[block] if isinstance(self.removed, tuple) else self.removed
        ratio = self.ratio[block] if isinstance(self.ratio, tuple) else self.ratio
        assert ratio is not None
        return int(ratio * length)


def _listed(schedule: float | tuple[float, ...] | None) -> tuple[float, ...]:
    if schedule is None:
        return ()
    return schedule if isinstance(schedule, tuple) else (schedule,)

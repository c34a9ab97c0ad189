"""The setting of a network whose tokens stop early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from segtrain.errors import UserError
from segtrain.reduction.setting import Setting, is_share

#: Ours: what DoViT's validations try beside the published thresholds, which are .95 to .985.
THRESHOLDS = (0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.9)


@dataclass(frozen=True)
class TokenPassing(Setting):
    """When a patch stops; never, if neither is given.

    Attributes:
        threshold: confidence above which it stops, from 0 (all stop at the first decision) to 1
            (none does); one for all decisions or one for each.
        keep: share of the patches that run on behind a decision, the least confident ones, rounded
            up to a multiple of 64 patches; one for all decisions or one for each. The cost does not
            depend on the image then. Ours.
    """

    threshold: float | tuple[float, ...] | None = None
    keep: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for field, value in self._given.items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or not all(is_share(number) for number in numbers):
                raise UserError(
                    f"'{field}' of a setting is a number from 0 to 1, or a list of them, one for "
                    f"each decision, not {list(value) if isinstance(value, tuple) else value!r}"
                )
        if len(self._given) > 1:
            raise UserError("a setting has 'threshold' or 'keep', not both")

    @property
    def _given(self) -> dict[str, float | tuple[float, ...]]:
        both = {"threshold": self.threshold, "keep": self.keep}
        return {field: value for field, value in both.items() if value is not None}

    @property
    def stops(self) -> bool:
        """Whether any patch may stop."""
        return bool(self._given)

    @property
    def data_dependent(self) -> bool:
        return self.threshold is not None

    @property
    def threshold_range(self) -> tuple[float, float] | None:
        return None if self.threshold is None else (0.0, 1.0)

    def with_threshold(self, threshold: float) -> Self:
        return self._renamed(threshold=threshold)

    def check_decisions(self, decisions: Sequence[int]) -> None:
        """Raise UserError if there is one value for each of another number of decisions."""
        for field, value in self._given.items():
            if isinstance(value, tuple) and len(value) != len(decisions):
                raise UserError(
                    f"'{field}' of a setting is one number or {len(decisions)}, one for each "
                    f"decision, not {len(value)}"
                )

    def describe(self) -> str:
        """Such as ``tau_0.96``, ``tau_0.96_0.955_0.95`` or ``keep_0.6_0.4_0.3``."""
        for field, value in self._given.items():
            numbers = value if isinstance(value, tuple) else (value,)
            symbol = {"threshold": "tau"}.get(field, field)
            return "_".join([symbol, *(str(number) for number in numbers)])
        return "full"


def published_settings(threshold: float = 0.96) -> list[TokenPassing]:
    """The one that the weights are trained under, none at all, and those of ``THRESHOLDS``."""
    values: list[dict[str, Any]] = [{"threshold": threshold}, {}]
    values += [{"threshold": other} for other in THRESHOLDS if other != threshold]
    return [TokenPassing.from_values(fields) for fields in values]


def at_decision(value: float | tuple[float, ...], decision: int) -> float:
    """Of one number for all decisions or one for each, that of a decision."""
    return value[decision] if isinstance(value, tuple) else value

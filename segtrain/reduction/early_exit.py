"""Dynamic token pruning (DToP, ICCV 2023, 2308.01045): tokens that are sure leave for good."""

from __future__ import annotations

import dataclasses
from typing import Self

import torch
from torch import Tensor

from segtrain.errors import UserError
from segtrain.reduction.setting import Setting, is_share


@dataclasses.dataclass(frozen=True)
class EarlyExit(Setting):
    """How sure a token leaves, and how many of the surest stay to inform the others.

    Attributes:
        thresholds: a token leaves whose highest class probability is above it; one for each exit
            but the last, or one for all of them; from 0 (all are sure) to 1 (none is).
        kept: of the tokens that are sure of a class, so many of each image stay, the surest first.
            At least one, so that no image is without tokens.
    """

    thresholds: tuple[float, ...] = (1.0,)
    kept: int = 5

    def __post_init__(self) -> None:
        values = self.thresholds
        if not isinstance(values, tuple) or not values or not all(map(is_share, values)):
            shown = list(values) if isinstance(values, tuple) else values
            raise UserError(
                f"'thresholds' of a setting is a list of numbers from 0 to 1, not {shown!r}"
            )
        if type(self.kept) is not int or self.kept < 1:
            raise UserError(f"'kept' of a setting is a whole number above 0, not {self.kept!r}")

    @property
    def data_dependent(self) -> bool:
        return min(self.thresholds) < 1

    @property
    def threshold_range(self) -> tuple[float, float] | None:
        return (0.0, 1.0) if self.data_dependent else None

    def with_threshold(self, threshold: float) -> Self:
        return self._renamed(thresholds=(threshold,))

    def describe(self) -> str:
        """Such as ``tau_0.9``, ``tau_0.95_0.9_kept_3`` or ``full``."""
        if not self.data_dependent:
            return "full"
        name = "_".join(["tau", *map(str, self.thresholds)])
        return name if self.kept == EarlyExit.kept else f"{name}_kept_{self.kept}"


def stay(
    probabilities: Tensor, images: Tensor, num_images: int, threshold: float, kept: int
) -> Tensor:
    """Which tokens go on: those that are not sure, and of each class the surest that are.

    Args:
        probabilities: (S, K), of each class at each token.
        images: (S,) int64, the image that each token is of.
        num_images: B.
        threshold, kept: as of `EarlyExit`.

    Returns:
        (S,) bool. Of equally sure tokens, those that come first stay.
    """
    confidence, classes = probabilities.max(dim=1)
    num_classes = probabilities.shape[1]
    unsure = confidence <= threshold
    groups = (images * num_classes + classes).masked_fill(unsure, num_images * num_classes)
    order = confidence.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    ordered = groups[order]
    ranks = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    surest = torch.empty_like(unsure).scatter_(0, order, ranks < kept)
    return unsure | surest

"""What every kind of merging gives: how to shorten tokens, and how to go back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Grid = tuple[int, int]

#: ``(merge, unmerge)``: (B, N, C) -> (B, n, C), and (B, n, D) -> (B, N, D).
Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _identity(values: Tensor) -> Tensor:
    return values


NO_MERGING: Pair = (_identity, _identity)

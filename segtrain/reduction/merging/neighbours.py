"""Neighbour merging: each window of tokens becomes its mean (SegFormer++, n1d and n2d)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from segtrain.reduction.merging.pair import Grid, Pair


def match_windows(grid: Grid, stride: tuple[int, int]) -> Pair:
    """Merge the tokens of each window of a grid.

    Windows at the right and lower edge that are cut short become the mean of what they hold, so a
    grid smaller than a window becomes one token. Going back takes the nearest merged token, which
    on a grid that the stride does not divide is not always the one a token went into: the official
    code does so, and a trained network expects it.

    Args:
        grid: (h, w) of the tokens, row by row.
        stride: (vertical, horizontal) size of a window.
    """
    height, width = (-(-length // step) for length, step in zip(grid, stride, strict=True))

    def merge(values: Tensor) -> Tensor:
        features = values.unflatten(1, grid).permute(0, 3, 1, 2)
        return F.avg_pool2d(features, stride, ceil_mode=True).flatten(2).mT

    def unmerge(values: Tensor) -> Tensor:
        features = values.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return F.interpolate(features, size=grid, mode="nearest").flatten(2).mT

    return merge, unmerge


def match_runs(length: int, stride: int) -> Pair:
    """Merge each run of tokens along the flattened grid; otherwise as ``match_windows``.

    Args:
        length: number of tokens.
        stride: length of a run.
    """

    def merge(values: Tensor) -> Tensor:
        return F.avg_pool1d(values.mT, stride, ceil_mode=True).mT

    def unmerge(values: Tensor) -> Tensor:
        return F.interpolate(values.mT, size=length, mode="nearest").mT

    return merge, unmerge

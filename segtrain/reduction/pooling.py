"""Spatial pooling of the tokens that become keys and values."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pool_grid(features: Tensor, pool: int) -> Tensor:
    """Average-pool a token grid, the spatial reduction of EDAFormer's ISR (paper section 3.3).

    Columns and rows that do not fill a whole cell are dropped, as the authors' code does. Where
    the grid is smaller than the pool, the pool is clamped to the grid: that axis becomes one cell
    (the authors' code fails there).

    Args:
        features: (B, C, h, w).
        pool: edge length of a cell; 1 leaves the grid as it is.

    Returns:
        (B, C, h // pool, w // pool).
    """
    if pool == 1:
        return features
    height, width = features.shape[2:]
    return F.avg_pool2d(features, (min(pool, height), min(pool, width)))

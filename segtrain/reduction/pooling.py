"""Spatial pooling of the tokens that become keys and values."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pool_tokens(tokens: Tensor, grid: tuple[int, int], pool: int) -> Tensor:
    """Average-pool a token grid, the spatial reduction of EDAFormer's ISR (paper section 3.3).

    Columns and rows that do not fill a whole cell are dropped, as the authors' code does. Where
    the grid is smaller than the pool, the pool is clamped to the grid: that axis becomes one cell
    (the authors' code fails there).

    Args:
        tokens: (B, h*w, C), row-major over the grid.
        grid: (h, w).
        pool: edge length of a cell, in tokens; 1 leaves the tokens as they are.

    Returns:
        (B, C, h // pool, w // pool).
    """
    height, width = grid
    cells = tokens.transpose(1, 2).unflatten(2, (height, width))
    if pool == 1:
        return cells
    return F.avg_pool2d(cells, (min(pool, height), min(pool, width)))

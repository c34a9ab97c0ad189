"""What makes a network cheaper at inference without retraining: pure functions, small modules."""

from segtrain.reduction.pooling import pool_grid
from segtrain.reduction.setting import Setting
from segtrain.reduction.staged import MERGING, StagedReduction, StageMerging

__all__ = ["MERGING", "Setting", "StageMerging", "StagedReduction", "pool_grid"]

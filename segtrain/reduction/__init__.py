"""What makes a network cheaper at inference without retraining: pure functions, small modules."""

from segtrain.reduction.pooling import pool_grid
from segtrain.reduction.setting import Setting

__all__ = ["Setting", "pool_grid"]

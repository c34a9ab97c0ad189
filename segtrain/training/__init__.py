"""Training a network: the LightningModule, its criterion, parameter groups and schedule."""

from segtrain.training.criteria import CrossEntropy, balanced_weights
from segtrain.training.finite import NonFiniteLoss
from segtrain.training.logging import log_metrics
from segtrain.training.module import SegmentationModule
from segtrain.training.optimization import AdamW, PolynomialSchedule
from segtrain.training.sharding import FullySharded

__all__ = [
    "AdamW",
    "CrossEntropy",
    "FullySharded",
    "NonFiniteLoss",
    "PolynomialSchedule",
    "SegmentationModule",
    "balanced_weights",
    "log_metrics",
]

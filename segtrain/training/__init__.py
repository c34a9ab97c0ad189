"""Training a network: the LightningModule, its criterion, parameter groups and schedule."""

from segtrain.training.criteria import CrossEntropy, balanced_weights
from segtrain.training.logging import log_metrics
from segtrain.training.module import SegmentationModule
from segtrain.training.optimization import AdamW, PolynomialSchedule

__all__ = [
    "AdamW",
    "CrossEntropy",
    "PolynomialSchedule",
    "SegmentationModule",
    "balanced_weights",
    "log_metrics",
]

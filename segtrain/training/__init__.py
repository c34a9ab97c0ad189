"""Training a network: the LightningModule, its criterion, parameter groups and schedule."""

from segtrain.training.attention_to_mask import AttentionToMaskLoss
from segtrain.training.criteria import CrossEntropy, balanced_weights
from segtrain.training.finite import NonFiniteLoss
from segtrain.training.logging import log_metrics
from segtrain.training.mask_classification import SetCriterion
from segtrain.training.module import SegmentationModule
from segtrain.training.optimization import (
    SGD,
    AdamW,
    Optimizer,
    PolynomialSchedule,
    create_optimizer,
)
from segtrain.training.sharding import FullySharded

__all__ = [
    "SGD",
    "AdamW",
    "AttentionToMaskLoss",
    "CrossEntropy",
    "FullySharded",
    "NonFiniteLoss",
    "Optimizer",
    "PolynomialSchedule",
    "SegmentationModule",
    "SetCriterion",
    "balanced_weights",
    "create_optimizer",
    "log_metrics",
]

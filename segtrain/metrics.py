"""Accuracy over a data set: one integer confusion matrix per setting, from which IoU follows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

Absent = Literal["nan", "unlabelled_nan", "one", "zero"]


class ConfusionMatrix(Metric):
    """Counts of (label, prediction) pairs over a data set, summed over ranks once.

    The state is integer and of fixed size: exact, and independent of the number of images.

    Args:
        num_classes: K; predictions are 0..K-1.
        num_settings: S, how many sets of predictions are counted side by side.
        ignore_index: label of the pixels that do not count.
    """

    matrix: Tensor
    full_state_update = False

    def __init__(self, num_classes: int, num_settings: int = 1, ignore_index: int = 255) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        zeros = torch.zeros(num_settings, num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrix", zeros, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, mask: Tensor, setting: int = 0) -> None:
        """Count one batch.

        Args:
            prediction: (B, H, W) integer classes.
            mask: (B, H, W) integer labels.
            setting: row of the state to count in.
        """
        self.matrix[setting] += count_pairs(prediction, mask, self.num_classes, self.ignore_index)

    def compute(self) -> Tensor:
        """(S, K, K) int64: rows are labels, columns predictions."""
        return self.matrix


def count_pairs(
    prediction: Tensor, mask: Tensor, num_classes: int, ignore_index: int = 255
) -> Tensor:
    """(K, K) int64 counts of (label, prediction); ignored pixels count nowhere.

    Ignored pixels go to an extra row that is cut off: cheaper than selecting the others, and free
    of a synchronisation with the device.
    """
    label = torch.where(mask == ignore_index, num_classes, mask).to(torch.int32)
    pairs = label.mul_(num_classes).add_(prediction).flatten()
    counts = torch.bincount(pairs, minlength=(num_classes + 1) * num_classes)
    return counts[: num_classes * num_classes].view(num_classes, num_classes)


def intersection_over_union(matrix: Tensor, absent: Absent = "nan") -> Tensor:
    """IoU of each class, in [0, 1].

    Args:
        matrix: (..., K, K) counts, rows labels, columns predictions.
        absent: value of a class without pixels in labels and predictions: NaN (mmsegmentation),
            one (PaddleSeg) or zero (the ADE20K benchmark's code); "unlabelled_nan" gives NaN to
            every class without labelled pixels, predicted or not (detectron2).

    Returns:
        (..., K) float64.
    """
    intersection = matrix.diagonal(dim1=-2, dim2=-1).double()
    labelled = matrix.sum(dim=-1)
    union = labelled + matrix.sum(dim=-2) - intersection
    iou = intersection / union  # 0/0 is NaN: the class occurs nowhere
    if absent == "unlabelled_nan":
        return iou.masked_fill(labelled == 0, torch.nan)
    if absent == "nan":
        return iou
    return iou.masked_fill(union == 0, 1.0 if absent == "one" else 0.0)


def mean_iou(matrix: Tensor, absent: Absent = "nan") -> Tensor:
    """(...) float64: mean over classes of :func:`intersection_over_union`, NaN left out."""
    return intersection_over_union(matrix, absent).nanmean(dim=-1)


def pixel_accuracy(matrix: Tensor) -> Tensor:
    """(...) float64: share of the labelled pixels that are predicted right."""
    right = matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1).double()
    return right / matrix.sum(dim=(-2, -1))

"""Losses from what a network gives in training and a label map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.networks.blocks import resize


def balanced_weights(counts: Tensor, limit: float = 3.0) -> list[float]:
    """Class weights from pixel counts (K,): frequency to the power of -1/2, up to a limit.

    They average to one over the counted pixels before the limit; a class without pixels gets one.
    """
    frequency = counts.double() / counts.sum()
    weights = frequency.rsqrt() / frequency.sqrt().sum()
    return weights.clamp(max=limit).where(counts > 0, 1.0).tolist()


class CrossEntropy(nn.Module):
    """Cross-entropy of scores that are upsampled to the labels' size.

    Args:
        reduction: ``all`` divides the sum by the number of all pixels, ignored ones included, as
            mmsegmentation 0.x and the code of many papers do; ``valid`` divides by the pixels that
            count (their summed weights, where classes are weighted).
        class_weights: one factor for each class.
        ignore_index: label of the pixels that do not count.
    """

    weight: Tensor | None

    def __init__(
        self,
        reduction: Literal["all", "valid"] = "all",
        class_weights: Sequence[float] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.ignore_index = ignore_index
        weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Scores (B, K, h, w) and labels (B, H, W) int64 -> the loss, a scalar."""
        scores = resize(scores.float(), (mask.shape[1], mask.shape[2]))
        loss = F.cross_entropy(
            scores, mask, self.weight, ignore_index=self.ignore_index, reduction="sum"
        )
        if self.reduction == "all":
            return loss / mask.numel()
        valid = mask != self.ignore_index
        weights = valid if self.weight is None else self.weight[mask * valid] * valid
        # Labels that are ignored throughout give a loss of 0, not of 0/0.
        return loss / weights.sum().clamp(min=torch.finfo(loss.dtype).tiny)

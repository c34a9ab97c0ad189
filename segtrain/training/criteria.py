"""Losses from what a network gives in training and a label map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.errors import UserError, check_arguments
from segtrain.networks.blocks import resize


def balanced_weights(counts: Tensor, limit: float = 3.0) -> list[float]:
    """Class weights from pixel counts (K,): frequency to the power of -1/2, up to a limit.

    They average to one over the counted pixels before the limit; a class without pixels gets one.
    """
    frequency = counts.double() / counts.sum()
    weights = frequency.rsqrt() / frequency.sqrt().sum()
    return weights.clamp(max=limit).where(counts > 0, 1.0).tolist()


@dataclass(frozen=True)
class HardExamples:
    """Online hard example mining (1604.03540), with the rule by which HRNet and DDRNet use it.

    Kept are the pixels whose label has a probability below the threshold, and at least the
    ``min_kept`` ones with the lowest probabilities.

    Args:
        threshold: probability of the label, in (0, 1].
        min_kept: pixels of the batch on this process; all labelled ones if there are fewer.
    """

    threshold: float = 0.9
    min_kept: int = 131072

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, (int, float)) or not 0 < self.threshold <= 1:
            raise UserError(
                f"criterion.hard_examples.threshold lies between 0 and 1, not at {self.threshold}"
            )
        if not isinstance(self.min_kept, int) or self.min_kept < 1:
            raise UserError(
                "criterion.hard_examples.min_kept is a whole number of pixels, at least 1, "
                f"not {self.min_kept}"
            )

    def __call__(self, hardness: Tensor, labelled: Tensor) -> Tensor:
        """Which pixels are kept, without waiting for the device.

        Args:
            hardness: (B, H, W), minus the logarithm of the label's probability.
            labelled: (B, H, W) bool, the pixels to choose from.

        Returns:
            (B, H, W) bool.
        """
        ordered = hardness.masked_fill(~labelled, -math.inf).flatten()
        hardest = ordered.topk(min(self.min_kept, len(ordered)), sorted=False).indices
        kept = ordered > -math.log(self.threshold)
        return kept.index_fill(0, hardest, True).view_as(labelled) & labelled


class CrossEntropy(nn.Module):
    """Cross-entropy of scores that are upsampled to the labels' size.

    Args:
        reduction: ``all`` divides the sum by the number of all pixels, ignored ones included, as
            mmsegmentation 0.x and the code of many papers do; ``valid`` divides by the pixels that
            count (their summed weights, where classes are weighted).
        class_weights: one factor for each class.
        ignore_index: label of the pixels that do not count.
        auxiliary_weight: factor on the loss of each further head.
        hard_examples: arguments of `HardExamples`, by which each head chooses the pixels that
            count, whatever the classes weigh; None takes all labelled ones. ``valid`` then divides
            by the kept pixels, ``all`` by all pixels as ever.
        label_smoothing: share of the target that is spread evenly over all classes.

    Raises:
        UserError: an argument has no possible value.
    """

    weight: Tensor | None

    def __init__(
        self,
        reduction: Literal["all", "valid"] = "all",
        class_weights: Sequence[float] | None = None,
        ignore_index: int = 255,
        auxiliary_weight: float = 0.4,
        hard_examples: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise UserError(
                f"criterion.label_smoothing lies between 0 and 1, not at {label_smoothing}"
            )
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.auxiliary_weight = auxiliary_weight
        self.hard_examples: HardExamples | None = None
        if hard_examples is not None:
            accepted = [field.name for field in fields(HardExamples)]
            check_arguments("criterion.hard_examples", hard_examples, accepted)
            self.hard_examples = HardExamples(**hard_examples)
        self.label_smoothing = label_smoothing
        weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, scores: Tensor | Sequence[Tensor], mask: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            scores: (B, K, h, w), or those of several heads, the main one first.
            mask: (B, H, W) int64 labels.
        """
        if isinstance(scores, Tensor):
            return self._loss(scores, mask)
        main, *auxiliary = (self._loss(head, mask) for head in scores)
        return main + self.auxiliary_weight * sum(auxiliary)

    def _loss(self, scores: Tensor, mask: Tensor) -> Tensor:
        scores = resize(scores.float(), (mask.shape[1], mask.shape[2]))
        losses = F.cross_entropy(
            scores,
            mask,
            self.weight,
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        counts = mask != self.ignore_index
        if self.hard_examples is not None:
            counts = self.hard_examples(self._hardness(scores, mask, losses), counts)
            losses = losses * counts
        if self.reduction == "all":
            return losses.sum() / mask.numel()
        weights = counts if self.weight is None else self.weight[mask * counts] * counts
        # Labels that are ignored throughout give a loss of 0, not of 0/0.
        return losses.sum() / weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)

    def _hardness(self, scores: Tensor, mask: Tensor, losses: Tensor) -> Tensor:
        """(B, H, W): what the losses would be without class weights and smoothing."""
        if self.weight is None and not self.label_smoothing:
            return losses.detach()
        return F.cross_entropy(
            scores.detach(), mask, ignore_index=self.ignore_index, reduction="none"
        )

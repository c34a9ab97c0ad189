"""The loss of attention to mask (SegViT, 2210.05844, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.networks.blocks import resize
from segtrain.networks.mask_prediction import MaskPrediction
from segtrain.training.mask_targets import mean_over_processes

#: Weight of a query whose class is not in the image, in the cross-entropy.
NO_OBJECT_WEIGHT = 0.1
#: Weights of the losses of the masks, beside 1 of the classes.
FOCAL_WEIGHT, DICE_WEIGHT = 20.0, 1.0
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


class Targets(NamedTuple):
    """What the queries of a batch should say.

    Attributes:
        present: (B, K) bool, the classes in each image.
        images, classes: (M,) int64, where ``present`` is true.
        masks: (M, H*W), 1 where the pixel is of the class, 0 where it is of another or ignored.
        divisor: scalar, M on average over all processes, at least 1.
    """

    present: Tensor
    images: Tensor
    classes: Tensor
    masks: Tensor
    divisor: Tensor


class AttentionToMaskLoss(nn.Module):
    """Cross-entropy of the queries' classes, focal and dice loss of their masks, over all heads.

    Query c is to find class c where the image has it, and nothing otherwise; nothing is matched.
    The mask losses are of classes in the image alone, on masks resized to the labels, and are
    divided by their number, averaged over the processes.

    Args:
        ignore_index: label of the pixels that are of no class.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, predictions: Sequence[MaskPrediction], mask: Tensor) -> Tensor:
        """The loss, a scalar: the sum over all heads, which weigh the same.

        Args:
            predictions: of each head, as networks give them in training.
            mask: (B, H, W) int64 labels.
        """
        targets = self.targets(mask, predictions[0].masks.shape[1])
        size = mask.shape[1], mask.shape[2]
        return torch.stack(
            [torch.stack(losses(head, targets, size)).sum() for head in predictions]
        ).sum()

    def targets(self, mask: Tensor, num_classes: int) -> Targets:
        """Labels (B, H, W) as what the queries should say."""
        labels = mask.masked_fill(mask == self.ignore_index, num_classes).flatten(1)
        present = torch.zeros(len(mask), num_classes + 1, dtype=torch.bool, device=mask.device)
        present = present.scatter_(1, labels, True)[:, :num_classes]
        images, classes = present.nonzero(as_tuple=True)
        count = mean_over_processes(present.sum().float())
        masks = (labels[images] == classes[:, None]).float()
        return Targets(present, images, classes, masks, count.clamp(min=1))


def losses(
    prediction: MaskPrediction, targets: Targets, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, focal and dice loss of one head, with their weights.

    Args:
        prediction: of the head.
        targets: of the batch.
        size: (H, W) of the labels.
    """
    logits = prediction.classes.float()
    kinds = logits.shape[2]
    # Of two kinds, the first is being there, whichever class the query is of.
    wanted = torch.arange(logits.shape[1], device=logits.device).clamp(max=kinds - 2)
    wanted = wanted.where(targets.present, kinds - 1)
    weight = logits.new_ones(kinds)
    weight[-1] = NO_OBJECT_WEIGHT
    cross_entropy = F.cross_entropy(logits.transpose(1, 2), wanted, weight)

    masks = prediction.masks[targets.images, targets.classes][:, None].float()
    masks = resize(masks, size).flatten(1)
    inside = masks.sigmoid()
    missed = torch.where(targets.masks > 0, 1 - inside, inside)
    alpha = torch.where(targets.masks > 0, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    pixels = F.binary_cross_entropy_with_logits(masks, targets.masks, reduction="none")
    focal = (alpha * missed**FOCAL_GAMMA * pixels).mean(dim=1)
    overlap = 2 * (inside * targets.masks).sum(dim=1) + 1
    dice = 1 - overlap / (inside.sum(dim=1) + targets.masks.sum(dim=1) + 1)
    return (
        cross_entropy,
        FOCAL_WEIGHT * focal.sum() / targets.divisor,
        DICE_WEIGHT * dice.sum() / targets.divisor,
    )

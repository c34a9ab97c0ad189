"""Panoptic quality (Kirillov et al., CVPR 2019), counted as panopticapi counts it.

torchmetrics' own counting differs where a prediction leaves pixels void, which panoptic
predictions do: it takes those pixels out of the union, and forgives a missed object that lies
mostly on them, so that its numbers are higher than published ones. It also knows no crowds, and
takes seconds for a large image. States, their sum over ranks and the quotients are torchmetrics'.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torchmetrics.detection
from torch import Tensor


class PanopticQuality(torchmetrics.detection.PanopticQuality):
    """Panoptic, segmentation and recognition quality of each class.

    Args:
        things: classes whose segments are told apart by their ids.
        num_classes: K; the classes that are no things are stuff.
    """

    def __init__(self, things: Collection[int], num_classes: int) -> None:
        stuff = sorted(set(range(num_classes)) - set(things))
        super().__init__(things, stuff, return_sq_and_rq=True, return_per_class=True)
        self.num_classes = num_classes

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count the segments of a batch.

        Args:
            preds: (B, H, W, 2) int: class and id of the segment of each pixel. A class outside of
                0..K-1 is void; ids of stuff count for nothing.
            target: the same of the ground truth. Void pixels with an id c + 1 above 0 are a crowd
                of class c: what is predicted there as that class is no mistake.
        """
        for prediction, truth in zip(preds, target, strict=True):
            self._count(prediction.flatten(0, 1), truth.flatten(0, 1))

    def compute(self) -> Tensor:
        """(K, 3) panoptic, segmentation and recognition quality, by class; NaN for absent ones."""
        qualities = super().compute()
        seen = self.true_positives + self.false_positives + self.false_negatives > 0
        qualities = qualities.masked_fill(~seen[:, None], torch.nan)
        order = [self.cat_id_to_continuous_id[category] for category in range(self.num_classes)]
        return qualities[order]

    def _count(self, prediction: Tensor, truth: Tensor) -> None:
        """Count one image, (pixels, 2) each."""
        predicted, segment_of_pixel = self._segments(prediction)
        true, true_segment_of_pixel = self._segments(truth)
        pairs = segment_of_pixel * len(true) + true_segment_of_pixel
        intersection = pairs.bincount(minlength=len(predicted) * len(true))
        intersection = intersection.view(len(predicted), len(true))
        area, true_area = intersection.sum(dim=1), intersection.sum(dim=0)

        categories, true_categories = predicted[:, 0], true[:, 0]
        is_void = true_categories < 0
        void = intersection[:, is_void & (true[:, 1] == 0)].sum(dim=1)
        same = (categories[:, None] == true_categories) & ~is_void
        union = area[:, None] + true_area - intersection - void[:, None]
        overlap = torch.where(same, intersection.double() / union, 0.0)
        matched = overlap > 0.5  # at most one for each segment

        crowd = is_void & (true[:, 1] == categories[:, None] + 1)
        forgiven = void + (intersection * crowd).sum(dim=1)
        missed = ~matched.any(dim=0) & ~is_void
        wrong = ~matched.any(dim=1) & (categories >= 0) & (2 * forgiven <= area)

        places = self._places(true_categories)
        found = matched.any(dim=0)
        overlaps = torch.where(matched, overlap, 0.0).sum(dim=0)
        self.iou_sum.index_add_(0, places[found], overlaps[found])
        for state, where in (
            (self.true_positives, places[found]),
            (self.false_negatives, places[missed]),
            (self.false_positives, self._places(categories)[wrong]),
        ):
            state.index_add_(0, where, torch.ones_like(where, dtype=state.dtype))

    def _segments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The segments (n, 2) of an image, class -1 for void, and the place of each pixel's."""
        categories, ids = pixels.long().unbind(dim=1)
        categories = torch.where(
            (categories >= 0) & (categories < self.num_classes), categories, -1
        )
        is_stuff = torch.ones(self.num_classes + 1, dtype=torch.bool, device=pixels.device)
        is_stuff[[*self.things, self.num_classes]] = False  # -1, void, is the last
        ids = torch.where(is_stuff[categories], 0, ids)
        span = ids.max() + 1
        codes, places = (categories * span + ids).unique(return_inverse=True)
        return torch.stack([codes.div(span, rounding_mode="floor"), codes % span], dim=1), places

    def _places(self, categories: Tensor) -> Tensor:
        """Where the states of classes are; void has none, and gets the first."""
        table = [self.cat_id_to_continuous_id[category] for category in range(self.num_classes)]
        return torch.tensor([*table, 0], device=categories.device)[categories]

"""The loss of mask classification: a set of queries against a set of masks (Mask2Former)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.networks.mask_prediction import MaskPrediction, MaskPredictions
from segtrain.training.mask_targets import (
    Targets,
    sample_labels,
    slots_per_image,
    surround,
    targets_of_classes,
)
from segtrain.training.matching import assign, pair_costs, sample_logits


class SetCriterion(nn.Module):
    """Cross-entropy of the queries' classes, cross-entropy and dice loss of their masks.

    Of every head, each mask of an image is found by the query that comes nearest to it, and the
    other queries should say that there is no object. Masks are compared at random points, in the
    loss mostly at those where the prediction is least certain (Mask2Former, 2112.01527, section
    3.3). Mask losses are summed over the pairs and divided by the number of masks, averaged over
    the processes; all heads weigh the same.

    A step waits for the device twice, both times for the matching: once for the classes in the
    images, in `targets`, and once for the costs of all heads, in `match`.

    Args:
        ignore_index: label of the pixels that are of no class.
        mask_stride: pixels of the padded image per pixel of the predicted masks.
        num_points: P, at which two masks are compared.
        oversample_ratio: points that the least certain ones are chosen of, per P.
        importance_ratio: share of the least certain ones among the P; the others are random.
        class_weight, mask_weight, dice_weight: of the three losses, and of the costs of a pair.
        no_object_weight: of a query that finds nothing, in the cross-entropy of the classes.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        mask_stride: int = 4,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.mask_stride = mask_stride
        self.num_points = num_points
        self.oversampled = int(oversample_ratio * num_points)
        self.uncertain = int(importance_ratio * num_points)
        self.weights = (class_weight, mask_weight, dice_weight)
        self.no_object_weight = no_object_weight

    def forward(self, predictions: MaskPredictions, mask: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            predictions: of all heads, as networks give them in training.
            mask: (B, H, W) int64 labels.
        """
        return self.loss(predictions, self.targets(mask, predictions.heads[0].classes.shape[2] - 1))

    def targets(self, mask: Tensor, num_classes: int) -> Targets:
        """One mask for each class in each image, of labels (B, H, W)."""
        return targets_of_classes(mask, num_classes, self.ignore_index)

    def loss(self, predictions: MaskPredictions, targets: Targets) -> Tensor:
        """The loss, a scalar, against any masks."""
        height, width = predictions.heads[0].masks.shape[2:]
        maps = surround(targets.maps, (height * self.mask_stride, width * self.mask_stride))
        total = torch.zeros((), device=maps.device)
        with torch.autocast(maps.device.type, enabled=False):
            pairs = self.match(predictions, targets, maps)
            for head, (queries, found) in zip(predictions.heads, pairs, strict=True):
                losses = self.losses(head, targets, maps, queries, found)
                for weight, loss in zip(self.weights, losses, strict=True):
                    total = total + weight * loss
                # Masks that find nothing are in the graph too, and no NaN in them goes unseen.
                total = total + 0 * head.masks.sum(dtype=torch.float32)
        return predictions.weight * total

    @torch.no_grad()
    def match(self, predictions: MaskPredictions, targets: Targets, maps: Tensor) -> Tensor:
        """Pairs of a query among B * Q and a mask among M, of every head: (heads, 2, N).

        Args:
            predictions: of all heads.
            targets: of the batch.
            maps: the targets', surrounded.
        """
        slots = slots_per_image(targets.counts, maps.device)
        costs = []
        for head in predictions.heads:
            points = self.random_points(len(maps), self.num_points, maps.device)
            costs.append(pair_costs(head, targets, maps, slots, points, self.weights))
        return assign(torch.stack(costs), targets.counts).to(maps.device, non_blocking=True)

    def losses(
        self,
        prediction: MaskPrediction,
        targets: Targets,
        maps: Tensor,
        queries: Tensor,
        found: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of classes, of masks and of their overlap of one head, without their weights.

        Args:
            prediction: of the head.
            targets: of the batch.
            maps: the targets', surrounded.
            queries: (N,) numbers among B * Q.
            found: (N,) numbers among M of what they find.
        """
        kinds = prediction.classes.shape[2]
        classes = prediction.classes.float().flatten(0, 1)
        wanted_classes = torch.full((len(classes),), kinds - 1, device=classes.device)
        wanted_classes[queries] = targets.classes[found]
        weight = classes.new_ones(kinds)
        weight[-1] = self.no_object_weight
        cross_entropy = F.cross_entropy(classes, wanted_classes, weight)

        masks = prediction.masks.flatten(0, 1)[queries, None].float()
        points = self.points(masks.detach())
        logits = sample_logits(masks, points)[:, 0]
        rows = targets.images[found] * maps.shape[1] + targets.layers[found]
        wanted = sample_labels(maps.flatten(0, 1), rows, targets.labels[found, None], points)[:, 0]
        pixels = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=1)
        inside = logits.sigmoid()
        overlap = 2 * (inside * wanted).sum(dim=1) + 1
        dice = 1 - overlap / (inside.sum(dim=1) + wanted.sum(dim=1) + 1)
        return cross_entropy, pixels.sum() / targets.divisor, dice.sum() / targets.divisor

    @torch.no_grad()
    def points(self, masks: Tensor) -> Tensor:
        """(N, P, 2) points of N predicted masks (N, 1, h, w), most where each is uncertain."""
        points = self.random_points(len(masks), self.oversampled, masks.device)
        certainty = sample_logits(masks, points)[:, 0].abs()
        chosen = certainty.topk(self.uncertain, dim=1, largest=False, sorted=False).indices
        chosen_points = points.gather(1, chosen[:, :, None].expand(-1, -1, 2))
        others = self.random_points(len(masks), self.num_points - self.uncertain, masks.device)
        return torch.cat((chosen_points, others), dim=1)

    def random_points(self, rows: int, number: int, device: torch.device) -> Tensor:
        """(rows, number, 2) points, uniform over the padded image, x and y from 0 to 1."""
        return torch.rand(rows, number, 2, device=device)

"""Which query is to find which mask (Mask2Former, 2112.01527, section 3.2; DETR, 2005.12872)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segtrain.networks.mask_prediction import MaskPrediction
from segtrain.training.mask_targets import NOWHERE, Targets, sample_labels

#: Cost of a pair where it is no number: such a loss is reported elsewhere, and the search goes on.
NO_NUMBER = 1e6


def sample_logits(masks: Tensor, points: Tensor) -> Tensor:
    """(N, C, P): bilinear values of maps (N, C, h, w) at points (N, P, 2), zero outside."""
    return F.grid_sample(masks, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]


def pair_costs(
    prediction: MaskPrediction,
    targets: Targets,
    maps: Tensor,
    slots: Tensor,
    points: Tensor,
    weights: tuple[float, float, float],
) -> Tensor:
    """(B, Q, T): what it costs each query of an image to be each of the image's masks.

    Args:
        prediction: of one head.
        targets: of the batch.
        maps: the targets', surrounded.
        slots: (B, T) the masks of each image.
        points: (B, P, 2) where all masks of an image are compared.
        weights: of class, cross-entropy and dice.
    """
    logits = sample_logits(prediction.masks.float(), points)
    wanted = logits.new_zeros(())
    for layer in range(maps.shape[1]):
        rows = torch.arange(len(maps), device=maps.device)
        labels = targets.labels.where(targets.layers == layer, NOWHERE)[slots]
        wanted = wanted + sample_labels(maps[:, layer], rows, labels, points)
    columns = wanted.transpose(1, 2)
    inside = logits.sigmoid()
    # t softplus(-x) + (1 - t) softplus(x) = softplus(x) - t x, so no pair is ever written out.
    cross_entropy = F.softplus(logits).sum(dim=2, keepdim=True) - logits @ columns
    overlap = 2 * inside @ columns + 1
    union = inside.sum(dim=2, keepdim=True) + wanted.sum(dim=2)[:, None] + 1
    probabilities = prediction.classes.float().softmax(dim=2)
    classes = targets.classes[slots][:, None].expand(-1, logits.shape[1], -1)
    return (
        -weights[0] * probabilities.gather(2, classes)
        + weights[1] * cross_entropy / points.shape[1]
        + weights[2] * (1 - overlap / union)
    )


def assign(costs: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The cheapest one-to-one pairs of every head and image, on the host.

    The costs are copied there at once, which waits for the device.

    Args:
        costs: (heads, B, Q, T).
        counts: masks of each image, at most T.

    Returns:
        (heads, 2, N): the number of the query among B * Q, and of its mask among all. As every head
        pairs the smaller of Q and the count in an image, N is the same for all.
    """
    from scipy.optimize import linear_sum_assignment

    queries = costs.shape[2]
    costs = costs.nan_to_num(NO_NUMBER, NO_NUMBER, NO_NUMBER).cpu()
    pairs = []
    for head in costs:
        first, found = 0, []
        for image, count in enumerate(counts):
            rows, columns = linear_sum_assignment(head[image, :, :count].numpy())
            pair = torch.stack((torch.from_numpy(rows), torch.from_numpy(columns)))
            found.append(pair + torch.tensor([[image * queries], [first]]))
            first += count
        pairs.append(torch.cat(found, dim=1))
    return torch.stack(pairs)

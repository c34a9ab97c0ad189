"""From the masks of queries to segments: panoptic and instance segmentation of one image.

The rules are those of Mask2Former (2112.01527), which takes them from MaskFormer (2107.06278,
section 3.4): masks are brought to the final size first, and judged there.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segtrain.inference import full_precision, interpolation_matrix, used_columns

#: Rows or columns of the final size that are interpolated at a time.
_BLOCK = 128


class Segment(NamedTuple):
    """What a panoptic map shows under one number.

    Attributes:
        id: the number, from 1.
        category: the class, 0..K-1.
        is_thing: whether there may be several of the class; all stuff of a class is one segment.
    """

    id: int
    category: int
    is_thing: bool


class PanopticPrediction(NamedTuple):
    """Which segment each pixel belongs to.

    Attributes:
        map: (H, W) int64 ids of segments, 0 where there is none (void).
        segments: by rising id.
    """

    map: Tensor
    segments: list[Segment]

    def categories_and_ids(self, void: int) -> Tensor:
        """(H, W, 2) int64: the class of each pixel, `void` where there is none, and its segment."""
        categories = [void, *(segment.category for segment in self.segments)]
        by_id = torch.tensor(categories, device=self.map.device)
        return torch.stack([by_id[self.map], self.map], dim=-1)


class InstancePrediction(NamedTuple):
    """n objects, in no order.

    Attributes:
        scores: (n,) class probability times the mean probability inside the mask.
        categories: (n,) int64 classes.
        masks: (n, H, W) bool.
    """

    scores: Tensor
    categories: Tensor
    masks: Tensor


def confident_queries(classes: Tensor, object_threshold: float = 0.8) -> Tensor:
    """(Q,) bool: which queries `panoptic_inference` looks at; others need no mask.

    Args:
        classes: (Q, K + 1) logits, "no object" last.
        object_threshold: least probability of the likeliest class.
    """
    scores, categories = classes.float().softmax(dim=1).max(dim=1)
    return (categories != classes.shape[1] - 1) & (scores > object_threshold)


def resize_masks(
    masks: Tensor, stride: int, image_size: Sequence[int], size: Sequence[int]
) -> Tensor:
    """Mask logits at the size of the labels.

    They are upsampled to the padded image, cropped to the image and resized, all bilinearly: one
    matrix per axis, so that nothing is held in between.

    Args:
        masks: (N, h, w) logits of an image that was padded at the right and the bottom.
        stride: of the masks, in pixels of the image.
        image_size: (height, width) of the image before padding.
        size: (H, W) of the labels.

    Returns:
        (N, H, W) float32.
    """
    masks = masks.float()
    rows, columns = (
        _axis_matrix(cells, stride, image, final)
        for cells, image, final in zip(masks.shape[1:], image_size, size, strict=True)
    )
    widened = masks.new_empty(*masks.shape[:2], size[1])
    resized = masks.new_empty(len(masks), *size)
    with full_precision(masks.device):
        for left in range(0, size[1], _BLOCK):
            weights, used = used_columns(columns[left : left + _BLOCK])
            widened[:, :, left : left + _BLOCK] = masks[:, :, used] @ weights.to(masks).T
        for top in range(0, size[0], _BLOCK):
            weights, used = used_columns(rows[top : top + _BLOCK])
            resized[:, top : top + _BLOCK] = weights.to(masks) @ widened[:, used]
    return resized


@functools.lru_cache(maxsize=16)
def _axis_matrix(cells: int, stride: int, image: int, final: int) -> Tensor:
    """(final, cells) one axis of `resize_masks`."""
    return interpolation_matrix(image, final) @ interpolation_matrix(cells, cells * stride)[:image]


def panoptic_inference(
    classes: Tensor,
    masks: Tensor,
    things: Collection[int],
    object_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> PanopticPrediction:
    """Give each pixel to one query, and drop the queries that lose too much of their masks.

    A pixel goes to the query whose class probability times mask probability is highest, if the
    mask's alone is at least a half there. Besides `masks` another array of that size is held, if
    all queries are confident.

    Args:
        classes: (Q, K + 1) logits, "no object" last.
        masks: (Q, H, W) logits at the final size.
        things: the classes of which there may be several.
        object_threshold: least probability of a query's class; others are dropped.
        overlap_threshold: least share of a query's mask that it has to win.
    """
    scores, categories = classes.float().softmax(dim=1).max(dim=1)
    kept = confident_queries(classes, object_threshold)
    scores, categories = scores[kept], categories[kept]
    count = len(scores)
    if count == 0:
        empty = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
        return PanopticPrediction(empty, [])

    probabilities = masks[kept].float().sigmoid_()  # a copy: indexing made it
    inside = probabilities >= 0.5
    winner = probabilities.mul_(scores[:, None, None]).argmax(dim=0)
    inside_winner = inside.gather(0, winner[None])[0]
    # Of each query: pixels won, pixels of its mask, and pixels that are both.
    won = winner.flatten().bincount(minlength=count).tolist()
    own = [int(mask.sum()) for mask in inside]
    both = winner[inside_winner].bincount(minlength=count).tolist()

    ids = [0] * count
    segments: list[Segment] = []
    stuff: dict[int, int] = {}
    for query, category in enumerate(categories.tolist()):
        if not both[query] or won[query] / own[query] < overlap_threshold:
            continue
        is_thing = category in things
        if not is_thing and category in stuff:
            ids[query] = stuff[category]
            continue
        ids[query] = len(segments) + 1
        segments.append(Segment(ids[query], category, is_thing))
        if not is_thing:
            stuff[category] = ids[query]
    by_query = torch.tensor(ids, device=masks.device)
    return PanopticPrediction(by_query[winner] * inside_winner, segments)


def instance_inference(
    classes: Tensor,
    masks: Tensor,
    count: int = 100,
    things: Collection[int] | None = None,
) -> InstancePrediction:
    """The likeliest pairs of a query and a class; a query may be there with several classes.

    Args:
        classes: (Q, K + 1) logits, "no object" last.
        masks: (Q, H, W) logits at the final size.
        count: of pairs, over all classes.
        things: keep only those of these classes among the `count`; None keeps all.
    """
    probabilities = classes.float().softmax(dim=1)[:, :-1]
    kinds = probabilities.shape[1]
    scores, pairs = probabilities.flatten().topk(min(count, probabilities.numel()), sorted=False)
    queries, categories = pairs // kinds, pairs % kinds
    if things is not None:
        kept = torch.isin(categories, torch.tensor(sorted(things), device=categories.device))
        scores, queries, categories = scores[kept], queries[kept], categories[kept]

    used, pair_of_used = queries.unique(return_inverse=True)
    inside = masks.new_empty((len(used), *masks.shape[1:]), dtype=torch.bool)
    quality = scores.new_empty(len(used))
    for i, query in enumerate(used.tolist()):
        torch.gt(masks[query], 0, out=inside[i])
        sure = (masks[query].float().sigmoid() * inside[i]).sum()
        quality[i] = sure / (inside[i].sum() + 1e-6)
    return InstancePrediction(scores * quality[pair_of_used], categories, inside[pair_of_used])

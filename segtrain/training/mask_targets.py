"""The masks that a network of mask classification is to find, and their values at points."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from segtrain.networks.blocks import Grid

#: What maps hold around the image, and what no map holds.
OUTSIDE, NOWHERE = -1, -2


class Targets(NamedTuple):
    """The M masks to be found in a batch of B images; the first image's come first.

    A mask is where a map has its label, so that no mask is ever written out. A map of classes or of
    segments is one layer; masks that overlap lie in several.

    Attributes:
        maps: (B, L, H, W) integers; labels are not negative.
        images, layers, labels: (M,) int64, where each mask is.
        classes: (M,) int64, what each is of.
        counts: number of masks in each image; on the host.
        divisor: scalar, M on average over all processes, at least 1.
    """

    maps: Tensor
    images: Tensor
    layers: Tensor
    labels: Tensor
    classes: Tensor
    counts: tuple[int, ...]
    divisor: Tensor


def targets_of_classes(mask: Tensor, num_classes: int, ignore_index: int) -> Targets:
    """One mask for each class in each image. Waits for the device, to learn which these are.

    Args:
        mask: (B, H, W) int64 labels.
        num_classes: K; labels are less, or ignored.
        ignore_index: label of the pixels that are in no mask.
    """
    labels = mask.masked_fill(mask == ignore_index, num_classes).flatten(1)
    present = torch.zeros(len(mask), num_classes + 1, dtype=torch.bool, device=mask.device)
    present = present.scatter_(1, labels, True)[:, :num_classes].cpu()
    images, classes = present.nonzero().T.to(mask.device, non_blocking=True)
    counts = tuple(present.sum(dim=1).tolist())
    return Targets(
        maps=mask[:, None],
        images=images,
        layers=torch.zeros_like(images),
        labels=classes,
        classes=classes,
        counts=counts,
        divisor=mean_over_processes(torch.full((), float(sum(counts)), device=mask.device)).clamp(
            min=1
        ),
    )


def mean_over_processes(total: Tensor) -> Tensor:
    """A number of each process, averaged over them; the tensor itself may change."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total


def slots_per_image(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(B, T): which of the M masks are each image's, T the largest count.

    The rows of images with fewer end in masks of other images.
    """
    each = torch.tensor(counts)
    slots = (each.cumsum(0) - each)[:, None] + torch.arange(max(counts))
    return slots.clamp(max=max(sum(counts) - 1, 0)).to(device, non_blocking=True)


def surround(maps: Tensor, size: Grid) -> Tensor:
    """Maps (B, L, H, W) of images padded right and bottom to a size, with a border of one pixel.

    The border spares every look at a point's neighbours the question whether they exist.
    """
    bottom, right = size[0] - maps.shape[2] + 1, size[1] - maps.shape[3] + 1
    return F.pad(maps.int(), (1, right, 1, bottom), value=OUTSIDE)


def sample_labels(maps: Tensor, rows: Tensor, labels: Tensor, points: Tensor) -> Tensor:
    """Bilinear values, from 0 to 1, of masks at points; a mask is 0 outside the image.

    The pixel at column j of W has its centre at x = (j + 0.5) / W.

    Args:
        maps: (R, H + 2, W + 2), surrounded.
        rows: (N,) of the R maps.
        labels: (N, T) of the masks in them.
        points: (N, P, 2), x and y from 0 to 1.

    Returns:
        (N, T, P).
    """
    height, width = maps.shape[1] - 2, maps.shape[2] - 2
    x, y = points[..., 0] * width + 0.5, points[..., 1] * height + 0.5
    column, row = x.floor(), y.floor()
    x, y = (x - column)[:, None], (y - row)[:, None]
    # Of the pixel left of and above each point, in the flat maps.
    index = row.long() * (width + 2) + column.long() + rows[:, None] * (maps.shape[1] * (width + 2))
    flat, labels = maps.flatten(), labels.int()[:, :, None]

    def inside(step: int) -> Tensor:
        return (flat[step:].take(index)[:, None] == labels).float()

    above = torch.lerp(inside(0), inside(1), x)
    below = torch.lerp(inside(width + 2), inside(width + 3), x)
    return torch.lerp(above, below, y)

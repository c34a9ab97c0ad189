"""Bipartite soft matching on a grid: similar tokens become their mean (ToMe; SegFormer++)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from segtrain.reduction.merging.pair import NO_MERGING, Grid, Pair
from segtrain.reduction.merging.slots import (
    add_up,
    at_least_float32,
    take,
    without_autocast,
)

#: Norms below it are taken for it: a token of zeros is similar to none, where the official code
#: divides by its norm and gets NaN.
TINY = 1e-30


def match_bipartite(metric: Tensor, grid: Grid, stride: tuple[int, int], removed: int) -> Pair:
    """Merge the tokens that most resemble the corner token of some window.

    The top-left token of each full window is a destination, all others are sources. Each source
    is matched with the destination of highest cosine similarity, and the ``removed`` sources of
    highest similarity become one with theirs: a destination turns into the plain mean of itself
    and its sources. The choice is made for each image, without randomness and without gradients,
    in float32 at least, also under autocast. (Bolya and Hoffman, "Token Merging for Fast Stable
    Diffusion", section 4, with the strides of SegFormer++, 2405.14467.)

    Args:
        metric: (B, h*w, C), the tokens that are compared, row by row.
        grid: (h, w).
        stride: (vertical, horizontal) size of a window. A grid smaller than a window in a
            direction has no destination: nothing is merged.
        removed: how many tokens fewer there are after merging, at most all sources.

    Returns:
        ``merge``, (B, h*w, D) -> (B, h*w - removed, D), the tokens in no particular order;
        ``unmerge``, its counterpart, which gives every merged token a copy of what it became.
    """
    destinations, sources, order = _split(metric, grid, stride)
    removed = min(removed, len(sources)) if len(destinations) else 0
    if removed <= 0:
        return NO_MERGING
    slots = fill_slots(*find_nearest(metric, destinations, sources), len(destinations), removed)
    slots = slots[:, order]
    length = metric.shape[1] - removed
    counts = add_up(torch.ones_like(slots[:, :, None], dtype=torch.float32), slots, length)

    def merge(values: Tensor) -> Tensor:
        return (add_up(at_least_float32(values), slots, length) / counts).to(values.dtype)

    def unmerge(values: Tensor) -> Tensor:
        return take(values, slots)

    return merge, unmerge


@torch.no_grad()
def find_nearest(metric: Tensor, destinations: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """The destination that each source resembles most.

    Args:
        metric: (B, N, C), the tokens that are compared, in float32 at least, also under autocast.
        destinations: (d,) positions, the same in each image.
        sources: (s,) positions.

    Returns:
        the cosine similarity (B, s), and which of the destinations it is (B, s).
    """
    with without_autocast(metric.device.type):
        metric = at_least_float32(metric)
        ends = _take_the_same(metric, destinations)
        ends = ends / ends.norm(dim=2, keepdim=True).clamp(min=TINY)
        starts = _take_the_same(metric, sources)
        # The length of a source does not change which destination is nearest.
        similarity, nearest = (starts @ ends.mT).max(dim=2)
        return similarity / starts.norm(dim=2).clamp(min=TINY), nearest


def fill_slots(similarity: Tensor, nearest: Tensor, num_destinations: int, removed: int) -> Tensor:
    """Where each token ends up, (B, N) int64: for the sources, then for the destinations.

    The slots begin with the kept sources in their order, then come the destinations. The
    ``removed`` sources of highest similarity go to their nearest destination.
    """
    kept = similarity.shape[1] - removed
    least = similarity.topk(kept, dim=1, largest=False, sorted=False).indices
    is_kept = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, least, True)
    slots = torch.where(is_kept, is_kept.cumsum(1) - 1, nearest + kept)
    ends_slots = torch.arange(kept, kept + num_destinations, device=slots.device)
    return torch.cat([slots, ends_slots.expand(len(slots), -1)], dim=1)


def _take_the_same(tokens: Tensor, positions: Tensor) -> Tensor:
    """(B, N, C) at the same positions (n,) of each image -> (B, n, C)."""
    return take(tokens, positions.expand(len(tokens), -1))


def _split(metric: Tensor, grid: Grid, stride: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the destinations, of the sources, and of each token in sources + destinations.

    Kept for each grid, except where tensors without values pass through (compiling, exporting).
    """
    if torch.compiler.is_compiling() or type(metric) is not Tensor:
        return _make_split(grid, stride, metric.device)
    return _kept_split(grid, stride, metric.device)


@functools.lru_cache(maxsize=256)
def _kept_split(
    grid: Grid, stride: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):  # what is kept serves training, too
        return _make_split(grid, stride, device)


def _make_split(
    grid: Grid, stride: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    (height, width), (vertical, horizontal) = grid, stride
    rows, columns = height // vertical, width // horizontal
    is_destination = torch.zeros(height, width, dtype=torch.bool, device=device)
    is_destination[: rows * vertical : vertical, : columns * horizontal : horizontal] = True
    is_destination = is_destination.flatten()
    num_sources = height * width - rows * columns
    order = torch.where(
        is_destination, is_destination.cumsum(0) + num_sources, (~is_destination).cumsum(0)
    )
    order = order - 1
    positions = torch.arange(height * width, device=device)
    positions = torch.empty_like(positions).scatter(0, order, positions)
    return positions[num_sources:], positions[:num_sources], order

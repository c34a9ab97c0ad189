"""Tokens that stop (DoViT, WACV 2024, 2308.01944): which ones run on, and the way back for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from segtrain.reduction.attention_core import PackedAttention
from segtrain.reduction.merging.pair import Grid

#: A budget's count of patches is a multiple of this.
BUDGET_STEP = 64


@dataclass(frozen=True)
class Selection:
    """The tokens that run, of B images with T tokens each.

    Attributes:
        indices: (S,) among all B * T tokens, image after image.
        lengths: how many there are of each image; they add up to S.
        num_tokens: T.
    """

    indices: Tensor
    lengths: tuple[int, ...]
    num_tokens: int

    @property
    def rectangular(self) -> bool:
        """Whether all images have equally many."""
        return len(set(self.lengths)) == 1

    @property
    def core(self) -> PackedAttention | None:
        """The attention among those of one image, where plain attention is not that."""
        return None if self.rectangular else PackedAttention(self.lengths)

    @property
    def resting(self) -> Tensor:
        """(B, T), True where a token does not run."""
        resting = self.indices.new_ones(len(self.lengths) * self.num_tokens, dtype=torch.bool)
        return resting.index_fill(0, self.indices, False).view(len(self.lengths), self.num_tokens)

    @property
    def _everything(self) -> bool:
        return min(self.lengths) == self.num_tokens

    def take(self, tokens: Tensor) -> Tensor:
        """(B, T, X) -> (B, n, X) where all images have n; else packed, (1, S, X)."""
        if self._everything:
            return tokens
        taken = tokens.flatten(0, 1)[self.indices]
        return taken.unflatten(0, (len(self.lengths) if self.rectangular else 1, -1))

    def put(self, tokens: Tensor, taken: Tensor) -> Tensor:
        """What `take` gave, changed, back among tokens (B, T, X), the others as they were."""
        if self._everything:
            return taken
        return tokens.flatten(0, 1).index_copy(0, self.indices, taken.flatten(0, 1)).view_as(tokens)

    def take_rotations(self, rotations: Tensor | None) -> Tensor | None:
        """Rotations (T, X) of one image -> (B, 1, n, X), or (S, X) of packed tokens."""
        if rotations is None or self._everything:
            return rotations
        taken = rotations[self.indices % self.num_tokens]
        return taken.unflatten(0, (len(self.lengths), 1, -1)) if self.rectangular else taken


def confidences(scores: Tensor, grid: Grid) -> Tensor:
    """The mean over each patch of the highest class probability, without a gradient.

    Args:
        scores: (B, K, s * h, s * w) for a whole number s.
        grid: (h, w).

    Returns:
        (B, h * w).
    """
    highest = scores.detach().float().softmax(dim=1).amax(dim=1)
    scale = scores.shape[2] // grid[0]
    assert highest.shape[1:] == (scale * grid[0], scale * grid[1])
    if scale > 1:
        highest = F.avg_pool2d(highest[:, None], scale)[:, 0]
    return highest.flatten(1)


def pass_on(
    active: Tensor,
    confidence: Tensor,
    threshold: float,
    previous: Tensor | None = None,
    difference: float = -1.0,
) -> Tensor:
    """The patches that stay active; one that has stopped stays so.

    Args:
        active: (B, N) bool.
        confidence: (B, N).
        threshold: a patch stops above it.
        previous: (B, N), what confidence was at the decision before.
        difference: a patch stops where confidence has risen by less than this; -1 for nowhere.

    Returns:
        (B, N) bool.
    """
    active = active & (confidence <= threshold)
    return active if previous is None else active & (confidence - previous >= difference)


def budget(num_patches: int, fraction: float) -> int:
    """A fraction of the patches, rounded up to a multiple of ``BUDGET_STEP``; all if it is more."""
    steps = math.ceil(round(fraction * num_patches / BUDGET_STEP, 9))
    return min(steps * BUDGET_STEP, num_patches)


def keep_least_confident(active: Tensor, confidence: Tensor, count: int) -> Tensor:
    """The ``count`` least confident of the active patches (B, N); of equal ones the first."""
    order = confidence.masked_fill(~active, math.inf).argsort(dim=1, stable=True)
    return torch.zeros_like(active).scatter(1, order[:, :count], True)


def stable_order(active: Tensor) -> Tensor:
    """(B, T) bool -> (B, T) indices: the active tokens, then the others, each kind in its order."""
    return active.to(torch.uint8).argsort(dim=1, descending=True, stable=True)


def exact_lengths(active: Tensor) -> list[int]:
    """How many tokens of (B, T) are active in each image."""
    lengths: list[int] = active.sum(dim=1).tolist()
    return lengths


def mean_lengths(active: Tensor) -> list[int]:
    """The mean of that over the batch, rounded down, for every image: the authors' batch rule.

    By `select`, an image with fewer active tokens has stopped ones run, too; one with more leaves
    out its last ones, which stay active and may run again after the next decision.
    """
    return [int(active.sum()) // len(active)] * len(active)


def select(active: Tensor, lengths: Sequence[int]) -> Selection:
    """The first tokens of each image by `stable_order`.

    Args:
        active: (B, T) bool.
        lengths: how many, of each image.
    """
    num_tokens = active.shape[1]
    order = stable_order(active)
    order = order + num_tokens * torch.arange(len(order), device=order.device)[:, None]
    rows = [row[:length] for row, length in zip(order, lengths, strict=True)]
    return Selection(torch.cat(rows), tuple(lengths), num_tokens)


def aggregate(tokens: Tensor, resting: Tensor, rate: float) -> Tensor:
    """Draw the first token half way to the mean of the resting ones, where these are many.

    Args:
        tokens: (B, T, C).
        resting: (B, T) bool.
        rate: share of an image's tokens above which they are many.

    Returns:
        (B, T, C).
    """
    count = resting.sum(dim=1, keepdim=True)
    total = tokens.masked_fill(~resting[..., None], 0).sum(dim=1)
    first = tokens[:, 0]
    drawn = (total / count.clamp(min=1) + first) / 2
    first = torch.where(count > rate * resting.shape[1], drawn, first)
    return torch.cat([first[:, None], tokens[:, 1:]], dim=1)

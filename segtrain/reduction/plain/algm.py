"""Adaptive local-then-global merging: like neighbours early, like tokens anywhere later."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from segtrain.errors import UserError
from segtrain.reduction.merging.slots import at_least_float32, without_autocast
from segtrain.reduction.plain.alternate import Alternation
from segtrain.reduction.plain.level import Grid
from segtrain.reduction.plain.merged import MergedTokens

#: Norms below it are taken for it: a token of zeros resembles none.
TINY = 1e-30


@dataclass(frozen=True)
class ALGM:
    """Adaptive local-then-global merging (2406.09936), between attention and MLP.

    All images of a batch lose as many tokens as the one that can spare the fewest; in evaluation
    networks are given one image at a time, so that none depends on others. On a grid of odd sides
    the last row or column is in no window; one of a single row or column has no window at all.

    Attributes:
        tau: windows of 2x2 patches merge where their mean cosine is at least this; below -1 all
            do, above 1 none.
        local_block: the block in which windows merge, counted from 1; 0 for none.
        global_block: the block in which tokens merge with their like anywhere, counted from 1;
            0 for none. If None, 5, or 7 where there are more than 12 blocks, and at most the last
            one. Its threshold is the images' own: the mean of the tokens' best similarities plus
            their standard deviation over the number of the block.
        proportional: whether tokens count in attention as often as they have patches. The authors
            do not do so in practice, and weights that were trained by them expect False.
    """

    main: ClassVar[str] = "tau"

    tau: float
    local_block: int = 1
    global_block: int | None = None
    proportional: bool = True

    def __post_init__(self) -> None:
        if type(self.tau) not in (int, float) or self.tau != self.tau:
            raise UserError(f"'tau' of 'algm' is a number, not {self.tau!r}")
        for name, block in (
            ("local_block", self.local_block),
            ("global_block", self.global_block or 0),
        ):
            if type(block) is not int or block < 0:
                raise UserError(f"'{name}' of 'algm' is a whole number from 0, not {block!r}")
        if self.global_block and self.global_block <= self.local_block:
            raise UserError(
                f"'global_block' of 'algm' comes behind 'local_block', {self.local_block}; "
                f"not {self.global_block}"
            )
        if type(self.proportional) is not bool:
            raise UserError(f"'proportional' of 'algm' is true or false, not {self.proportional!r}")

    def check(self, depth: int) -> None:
        """Raise UserError if it does not fit that many blocks."""
        last = max(self.local_block, self.global_block or 0)
        if last > depth:
            raise UserError(f"'algm' merges in block {last}, the encoder has {depth}")

    def describe(self) -> str:
        """Its threshold."""
        return str(self.tau)

    def blocks(self, depth: int) -> Collection[int]:
        """The local one and the global one, which may be none."""
        later = self.global_block
        if later is None:
            later = min(7 if depth > 12 else 5, depth)
        return {block - 1 for block in (self.local_block, later) if block}

    def match(
        self, block: int, tokens: MergedTokens, keys: Tensor, grid: Grid
    ) -> tuple[Tensor, int] | None:
        """Slots for like windows or like tokens; see `Merging`."""
        if block == self.local_block - 1:
            return match_windows_above(tokens.patches, grid, self.tau)
        return match_above_mean(tokens.patches, tokens.num_prefix, block + 1)


@torch.no_grad()
def match_windows_above(patches: Tensor, grid: Grid, threshold: float) -> tuple[Tensor, int] | None:
    """Merge the 2x2 windows whose tokens resemble each other.

    Args:
        patches: (B, h*w, C).
        grid: (h, w).
        threshold: of the mean cosine of the six pairs in a window.

    Returns:
        slots (B, h*w) and their number, the merged windows first, then the other tokens, both row
        by row; None if nothing merges.
    """
    similarity = window_similarity(patches, grid)
    merging = int((similarity >= threshold).sum(1).min())
    if not merging:
        return None
    nearest = similarity.topk(merging, dim=1, sorted=False).indices
    merges = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, nearest, True)
    windows = window_numbers(grid, similarity.shape[1], patches.device)
    # A last entry stands for the tokens that are in no window.
    merged_slots = torch.nn.functional.pad(merges.cumsum(1) - 1, (0, 1))[:, windows]
    is_merged = torch.nn.functional.pad(merges, (0, 1))[:, windows]
    slots = torch.where(is_merged, merged_slots, merging + (~is_merged).cumsum(1) - 1)
    return slots, patches.shape[1] - 3 * merging


def window_similarity(patches: Tensor, grid: Grid) -> Tensor:
    """Mean cosine of the pairs in each 2x2 window: (B, h*w, C) -> (B, h//2 * w//2)."""
    height, width = grid[0] // 2, grid[1] // 2
    with without_autocast(patches.device.type):
        units = at_least_float32(patches)
        units = units / units.norm(dim=2, keepdim=True).clamp(min=TINY)
        windows = units.unflatten(1, grid)[:, : 2 * height, : 2 * width]
        windows = windows.unflatten(2, (width, 2)).unflatten(1, (height, 2))  # (B, h, 2, w, 2, C)
        # The square of the sum holds every pair twice, and each token with itself.
        pairs = windows.sum((2, 4)).square().sum(3) - windows.square().sum((2, 4, 5))
        return pairs.flatten(1) / 12


def window_numbers(grid: Grid, num_windows: int, device: torch.device) -> Tensor:
    """(h*w,) which 2x2 window each token is in; ``num_windows`` where it is in none."""
    height, width = grid[0] // 2, grid[1] // 2
    numbers = torch.full(grid, num_windows, device=device)
    windows = torch.arange(num_windows, device=device).view(height, width)
    numbers[: 2 * height, : 2 * width] = windows.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return numbers.flatten()


@torch.no_grad()
def match_above_mean(patches: Tensor, num_prefix: int, number: int) -> tuple[Tensor, int] | None:
    """Merge tokens whose best similarity stands out among those of the image.

    Args:
        patches: (B, T, C).
        num_prefix: how many tokens stand in front of them.
        number: of the block, counted from 1: the higher, the lower the threshold.

    Returns:
        slots (B, T) and their number; None if nothing merges.
    """
    alternation = Alternation(patches, num_prefix)
    best = alternation.similarity
    if best is None:
        return None
    spread = best.std(1) if best.shape[1] > 1 else torch.zeros_like(best[:, 0])
    threshold = (best.mean(1) + spread / number).mean()
    return alternation.merge(int((best >= threshold).sum(1).min()))

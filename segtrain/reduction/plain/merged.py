"""Running a plain vision transformer in whose blocks tokens merge."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from segtrain.reduction.attention_core import AttentionCore, ProportionalAttention
from segtrain.reduction.merging.slots import add_up, at_least_float32, take
from segtrain.reduction.plain.level import Encoder, Grid, Level, finish


@dataclasses.dataclass(frozen=True)
class MergedTokens:
    """Tokens on their way, and which of them each patch has become a part of.

    Attributes:
        tokens: (B, P+T, C); the P in front are no patches, and never merge.
        num_prefix: P.
        sizes: (B, T), how many patches each stands for; None as long as it is one.
        slots: (B, N), which of the T tokens each patch is in; None as long as it is its own.
    """

    tokens: Tensor
    num_prefix: int
    sizes: Tensor | None = None
    slots: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """(B, T, C)."""
        return self.tokens[:, self.num_prefix :]

    def merge(self, slots: Tensor, length: int) -> MergedTokens:
        """The tokens become ``length`` means over all their patches, by slots (B, T)."""
        if length == self.patches.shape[1]:
            return self
        patches = at_least_float32(self.patches)
        sizes = patches.new_ones(patches.shape[:2]) if self.sizes is None else self.sizes
        merged_sizes = add_up(sizes[:, :, None], slots, length)
        means = add_up(patches * sizes[:, :, None], slots, length) / merged_sizes
        prefix = self.tokens[:, : self.num_prefix]
        return MergedTokens(
            torch.cat([prefix, means.to(prefix)], dim=1),
            self.num_prefix,
            merged_sizes[:, :, 0],
            slots if self.slots is None else slots.gather(1, self.slots),
        )

    def attention(self) -> AttentionCore | None:
        """Attention in which a token counts as often as it has patches."""
        if self.sizes is None:
            return None
        prefix = self.sizes.new_ones(len(self.sizes), self.num_prefix)
        return ProportionalAttention(torch.cat([prefix, self.sizes], dim=1))

    def level(self, tokens: Tensor) -> Level:
        """For tokens (B, P+T, C) in the places of these."""
        patches = tokens[:, self.num_prefix :]
        if self.slots is None:
            return Level(patches)
        return Level(patches, functools.partial(take, slots=self.slots))


class Merging(Protocol):
    """What merges where; blocks are counted from 0."""

    @property
    def proportional(self) -> bool:
        """Whether attention weighs tokens by their sizes."""

    def blocks(self, depth: int) -> Collection[int]:
        """The blocks between whose attention and MLP tokens merge."""

    def match(
        self, block: int, tokens: MergedTokens, keys: Tensor, grid: Grid
    ) -> tuple[Tensor, int] | None:
        """Where the patches end up.

        Args:
            block: the block that the tokens are in.
            tokens: behind its attention.
            keys: (B, P+T, d), of that attention, the mean over its heads.
            grid: (h, w) of the patches before anything merged.

        Returns:
            slots (B, T) int64 and how many there are; None if nothing merges.
        """


class _KeptKeys(AttentionCore):
    """Keeps the keys of an attention, or of the one that takes its place."""

    keys: Tensor

    def __init__(self, core: AttentionCore | None) -> None:
        super().__init__()
        self.core = core

    def attend(
        self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        self.keys = key.detach().mean(1)
        if self.core is None:
            return attention(query, key, value)
        return self.core.attend(attention, query, key, value)


def run_merging(
    encoder: Encoder, tokens: Tensor, grid: Grid, merging: Merging, outputs: Sequence[int]
) -> list[Level]:
    """Run all blocks up to the last output, tokens merging on the way.

    Args:
        encoder: whose blocks run.
        tokens: (B, P+N, C), as embedded.
        grid: (h, w) of the patches.
        merging: what merges where.
        outputs: indices of blocks, ascending.

    Returns:
        the level after each of them.
    """
    merged, levels = MergedTokens(tokens, encoder.num_prefix), []
    merging_blocks = merging.blocks(encoder.depth)
    for block in range(outputs[-1] + 1):
        core = merged.attention() if merging.proportional else None
        between = None
        if block in merging_blocks:
            core = kept = _KeptKeys(core)
            between = _Between(merged, functools.partial(merging.match, block, grid=grid), kept)
        mixed = encoder.run([block], merged.tokens, core=core, between=between)
        merged = merged if between is None else between.after
        merged = dataclasses.replace(merged, tokens=mixed)
        if block in outputs:
            levels.append(merged.level(finish(encoder, block, merged.tokens)))
    return levels


class _Between:
    """Merges the tokens of a block between its halves, each time in the same way.

    The block may be called again for its gradients.
    """

    after: MergedTokens

    def __init__(
        self,
        before: MergedTokens,
        match: Callable[[MergedTokens, Tensor], tuple[Tensor, int] | None],
        kept: _KeptKeys,
    ) -> None:
        self.before, self.match, self.kept = before, match, kept
        self.matched: list[tuple[Tensor, int] | None] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        merged = dataclasses.replace(self.before, tokens=tokens)
        if not self.matched:
            self.matched.append(self.match(merged, self.kept.keys))
        (matched,) = self.matched
        self.after = merged if matched is None else merged.merge(*matched)
        return self.after.tokens

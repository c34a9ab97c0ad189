"""What a plain vision transformer gives after a block, when tokens may have been merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from segtrain.reduction.attention_core import AttentionCore
from segtrain.reduction.merging.pair import Grid


class Encoder(Protocol):
    """A plain vision transformer, as `segtrain.networks.plain_vit.PlainViT` is one."""

    depth: int
    num_prefix: int
    vit: Any

    @property
    def reducible(self) -> bool: ...
    def embed(self, images: Tensor) -> tuple[Tensor, Grid, Tensor | None]: ...
    def run(
        self,
        blocks: Iterable[int],
        tokens: Tensor,
        rotations: Tensor | None = None,
        core: AttentionCore | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Level:
    """The tokens after a block, without those that stand before the patches.

    Attributes:
        tokens: (B, T, C), one for each patch or for several.
        restore: from values of the tokens (B, T, X) to those of all patches (B, N, X).
    """

    tokens: Tensor
    restore: Callable[[Tensor], Tensor] = field(default=lambda values: values)


def run_plainly(
    encoder: Encoder, tokens: Tensor, rotations: Tensor | None, outputs: Sequence[int]
) -> list[Level]:
    """Run all blocks up to the last output.

    Args:
        encoder: whose blocks run.
        tokens: (B, P+N, C), as embedded.
        rotations: of the positions, if the encoder has any.
        outputs: indices of blocks, ascending; a final norm belongs to the last block.

    Returns:
        the level after each of them.
    """
    levels, start = [], 0
    for output in outputs:
        tokens = encoder.run(range(start, output + 1), tokens, rotations)
        start = output + 1
        levels.append(Level(finish(encoder, output, tokens)[:, encoder.num_prefix :]))
    return levels


def finish(encoder: Encoder, block: int, tokens: Tensor) -> Tensor:
    """What a block gives as an output: the final norm belongs to the last one."""
    return encoder.vit.norm(tokens) if block == encoder.depth - 1 else tokens

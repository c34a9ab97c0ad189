"""timm's blocks, open in two places: at the attention, and behind it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from segtrain.reduction.attention_core import AttentionCore


def attending_by(core: AttentionCore | None) -> AbstractContextManager[Any]:
    """Within it attention is the core's, or the plain one."""
    return nullcontext() if core is None else core


# What is entered or done inside of a block's own call is done again where the block is recomputed,
# and finds its parameters whole where they are shared out.


class OpenBlock(Block):
    """(B, T, C) -> (B, T', C).

    Call it with ``core``, what takes the place of plain attention, and ``between``, which gives
    the tokens (B, T', C) that go on from those behind the attention (B, T, C).
    """

    def forward(  # type: ignore[override]  # called here alone
        self,
        tokens: Tensor,
        core: AttentionCore | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        with attending_by(core):
            branch = self.attn(self.norm1(tokens))
        tokens = tokens + self.drop_path1(self.ls1(branch))
        if between is not None:
            tokens = between(tokens)
        return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))


class OpenEvaBlock(EvaBlock):
    """(B, T, C) -> (B, T, C); ``core`` takes the place of plain attention."""

    def forward(  # type: ignore[override]  # called here alone
        self, tokens: Tensor, core: AttentionCore | None = None, rope: Tensor | None = None
    ) -> Tensor:
        with attending_by(core):
            return super().forward(tokens, rope)


def open_block(block: nn.Module) -> bool:
    """Make a block of timm's one of these, its layers as they are; False if it is of another kind.

    Subclasses that only change how a block is called need no new layers, nor new names.
    """
    kinds: dict[type[nn.Module], type[nn.Module]] = {Block: OpenBlock, EvaBlock: OpenEvaBlock}
    if type(block) not in kinds:
        return False
    block.__class__ = kinds[type(block)]
    return True

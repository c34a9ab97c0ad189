"""Shrunk (SegViT, 2210.05844): tokens that leave a plain vision transformer, and come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from segtrain.networks.attention_to_mask import AttentionToMask
from segtrain.networks.blocks import (
    Grid,
    grid_from_tokens,
    initialise_linear,
    merge_heads,
    resize,
    split_heads,
    tokens_from_grid,
)
from segtrain.networks.mask_prediction import MaskPrediction


class ShrinkingBlock(nn.Module):
    """A block of timm from which only some of its tokens go on, looking at all of them.

    Args:
        block: whose layers it takes over, by their names.
    """

    attn: Any
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    ls1: nn.Module
    ls2: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: Block) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, module)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """(B, N, C), and which of the N tokens are kept, (T,) int64 -> (B, T, C)."""
        normed = self.norm1(tokens)
        tokens = tokens[:, kept]
        tokens = tokens + self.drop_path1(self.ls1(self._attend(normed, kept)))
        return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))

    def _attend(self, tokens: Tensor, kept: Tensor) -> Tensor:
        attention = self.attn
        query, key, value = attention.qkv(tokens).chunk(3, dim=2)
        query, key, value = (
            split_heads(tensor, attention.num_heads) for tensor in (query[:, kept], key, value)
        )
        query, key = attention.q_norm(query), attention.k_norm(key)
        dropout = attention.attn_drop.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return attention.proj_drop(attention.proj(merge_heads(attended)))


class ShrunkDecoder(nn.Module):
    """Tokens of the whole grid gather what shrunk and unshrunk maps say, then classes ask them.

    Args:
        in_width: C of the maps' tokens.
        num_classes: K.
        num_tokens: of the whole grid in training.
        num_maps: how many maps there are, shallow to deep.
        num_heads: of all attention, in width C / 2.
        num_layers: for each map, and of attention to mask.
    """

    def __init__(
        self,
        in_width: int,
        num_classes: int,
        num_tokens: int,
        num_maps: int,
        num_heads: int,
        num_layers: int,
    ) -> None:
        super().__init__()
        width = in_width // 2
        self.tokens = nn.Embedding(num_tokens, width)
        self.projections = nn.ModuleList(nn.Linear(in_width, width) for _ in range(num_maps))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_maps))
        self.gathering = nn.ModuleList(
            nn.TransformerDecoder(
                nn.TransformerDecoderLayer(width, num_heads, 4 * width, batch_first=True),
                num_layers,
            )
            for _ in range(num_maps)
        )
        self.queries = nn.Embedding(num_classes, width)
        self.attention = AttentionToMask(None, width, num_heads, num_layers)
        self.classifier = nn.Linear(width, num_classes + 1)
        self.apply(initialise_linear)

    def forward(self, maps: Sequence[Tensor], tokens: Tensor, grid: Grid) -> list[MaskPrediction]:
        """What is predicted behind each layer, the last one first.

        Args:
            maps: (B, T, C) each, shallow to deep.
            tokens: (1, N, D), the learnt ones for this grid.
            grid: (h, w) of the N tokens.
        """
        tokens = tokens.expand(len(maps[0]), -1, -1)
        for projection, norm, gather, features in zip(
            self.projections, self.norms, self.gathering, maps, strict=True
        ):
            tokens = gather(tokens, norm(projection(features)))
        queries = self.queries.weight.expand(len(tokens), -1, -1)
        return [
            MaskPrediction(self.classifier(queries), grid_from_tokens(masks.transpose(1, 2), grid))
            for queries, masks in reversed(self.attention(queries, tokens))
        ]


def resize_tokens(tokens: Tensor, source: Grid, grid: Grid) -> Tensor:
    """(1, N, D) of one grid -> those of another, bilinearly."""
    if source == grid:
        return tokens
    return tokens_from_grid(resize(grid_from_tokens(tokens, source), grid))

"""Attention to mask (SegViT, 2210.05844): where a class's query looks is where the class is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from segtrain.networks.blocks import merge_heads, split_heads


class CrossAttention(nn.Module):
    """Attention of queries to tokens that also gives its logits, averaged over the heads.

    Args:
        width: D of queries and tokens.
        num_heads: they divide D.
        dropout: rate of dropping attention weights and channels of what it gives.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, queries: Tensor, tokens: Tensor, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, K, D), and tokens (B, T, D) or (1, S, D) -> (B, K, D), and logits of tokens' shape.

        Args:
            lengths: tokens of each image, where they stand one image after the other, S in all.

        Returns:
            what is attended to, and logits (B, K, T) or (1, K, S).
        """
        query = split_heads(self.query(queries), self.num_heads)
        query = query * (query.shape[3] ** -0.5)
        key, value = (
            split_heads(project(tokens), self.num_heads) for project in (self.key, self.value)
        )
        if lengths is None:
            attended, logits = self._attend(query, key, value)
        else:
            images = zip(
                query.split(1),
                key.split(lengths, dim=2),  # type: ignore[arg-type]
                value.split(lengths, dim=2),  # type: ignore[arg-type]
                strict=True,
            )
            results = [self._attend(*image) for image in images]
            attended = torch.cat([attended for attended, _ in results])
            logits = torch.cat([logits for _, logits in results], dim=2)
        return self.dropout(self.projection(merge_heads(attended))), logits

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        logits = query @ key.transpose(2, 3)
        return self.dropout(logits.softmax(dim=3)) @ value, logits.mean(dim=1)


class AttentionToMaskLayer(nn.Module):
    """Self-attention, attention to the tokens and an MLP, each with a norm behind its residual.

    Args:
        width: D of queries and tokens.
        num_heads: of either attention.
        dropout: rate of all that drops.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.self_attention = Attention(
            width, num_heads, qkv_bias=True, attn_drop=dropout, proj_drop=dropout
        )
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, act_layer=nn.ReLU, drop=dropout)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self, queries: Tensor, tokens: Tensor, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `CrossAttention`: (B, K, D) and tokens -> queries (B, K, D) and mask logits."""
        queries = self.norm1(queries + self.self_attention(queries))
        attended, masks = self.cross_attention(queries, tokens, lengths)
        queries = self.norm2(queries + attended)
        return self.norm3(queries + self.mlp(queries)), masks


class AttentionToMask(nn.Module):
    """Tokens of one level of the encoder, and the layers in which queries look at them.

    Args:
        in_width: C of the tokens; None if they are of the queries' width and need no projection.
        width: D of the queries.
        num_heads: of the layers.
        num_layers: one after the other.
    """

    def __init__(self, in_width: int | None, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.projection: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        if in_width is not None:
            self.projection, self.norm = nn.Linear(in_width, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            AttentionToMaskLayer(width, num_heads) for _ in range(num_layers)
        )

    def forward(
        self, queries: Tensor, tokens: Tensor, lengths: Sequence[int] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """(B, K, D) and tokens (B, T, C) -> queries (B, K, D) and masks (B, K, T) of each layer.

        With ``lengths``, tokens (1, S, C) and masks (1, K, S) are those of the images one after the
        other.
        """
        tokens = self.norm(self.projection(tokens))
        found = []
        for layer in self.layers:
            queries, masks = layer(queries, tokens, lengths)
            found.append((queries, masks))
        return found

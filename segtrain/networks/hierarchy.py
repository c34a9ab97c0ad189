"""The pyramid of transformer stages that SegFormer's encoder (MiT) and its kin share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from segtrain.networks.blocks import Grid, OverlappingPatchEmbedding, grid_from_tokens

#: Convolutions (kernel, stride) that begin the stages.
EMBEDDINGS = ((7, 4), (3, 2), (3, 2), (3, 2))


class Block(nn.Module):
    """Pre-norm residual block of attention and MLP; one drop path serves both branches.

    Args:
        width: C of the tokens (B, h*w, C).
        attention: called with tokens, their grid and what the setting says for it.
        mlp: called with tokens and their grid.
        drop_path: rate of dropping a branch, for each image.
        eps: of both norms.
    """

    def __init__(
        self, width: int, attention: nn.Module, mlp: nn.Module, drop_path: float, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, grid: Grid, reduction: Any) -> Tensor:
        tokens = tokens + self.drop_path(self.attention(self.norm1(tokens), grid, reduction))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens), grid))


class Stage(nn.Module):
    """Patch embedding, blocks and a norm: (B, C_in, H, W) -> (B, C, h, w)."""

    def __init__(
        self, embedding: OverlappingPatchEmbedding, blocks: Iterable[Block], norm: nn.LayerNorm
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, features: Tensor, reduction: Any) -> Tensor:
        tokens, grid = self.embedding(features)
        for block in self.blocks:
            tokens = block(tokens, grid, reduction)
        return grid_from_tokens(self.norm(tokens), grid)


class HierarchicalEncoder(nn.Module):
    """Stages one after the other: feature maps at strides 4, 8, 16 and 32."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor, reductions: Sequence[Any]) -> list[Tensor]:
        """(B, 3, H, W), and what the setting says for each stage -> (B, C_i, H/s_i, W/s_i)."""
        features = []
        for stage, reduction in zip(self.stages, reductions, strict=True):
            images = stage(images, reduction)
            features.append(images)
        return features


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """The rates of each stage's blocks, rising linearly from 0 over all of them."""
    rates = torch.linspace(0, last, sum(depths), device="cpu").split(list(depths))
    return [rate.tolist() for rate in rates]

"""The pyramid of transformer stages that SegFormer's encoder (MiT) and its kin share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
    """Stages one after the other: feature maps at strides 4, 8, 16 and 32.

    Args:
        widths: channels of stages 1 to 4.
        depths: blocks of each stage.
        drop_path: rate of the last block; the rates rise linearly from 0.
        make_block: the block of a stage (0 to 3) with a drop path rate.
        embedding_eps: of the norms after the patch embeddings.
        eps: of the norms that end the stages.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        drop_path: float,
        make_block: Callable[[int, float], Block],
        embedding_eps: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            Stage(
                OverlappingPatchEmbedding(before, width, kernel, stride, embedding_eps),
                [make_block(stage, rate) for rate in rates],
                nn.LayerNorm(width, eps=eps),
            )
            for stage, (before, width, (kernel, stride), rates) in enumerate(
                zip(
                    (3, *widths[:-1]),
                    widths,
                    EMBEDDINGS,
                    drop_path_rates(drop_path, depths),
                    strict=True,
                )
            )
        )

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


def initialise(module: nn.Module) -> None:
    """Initial weights of one layer, as the code of this family draws them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)

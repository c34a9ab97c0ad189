"""Building blocks that several networks share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


class OverlappingPatchEmbedding(nn.Module):
    """A strided convolution whose kernel overlaps, to normalised tokens (SegFormer, section 3.1).

    (B, C_in, H, W) -> tokens (B, h*w, C_out) and their grid (h, w) = ceil((H, W) / stride).
    """

    def __init__(self, in_channels: int, width: int, kernel: int, stride: int, eps: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, width, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        features = self.projection(images)
        height, width = features.shape[2:]
        return self.norm(features.flatten(2).transpose(1, 2)), (height, width)


class DepthwiseMLP(nn.Module):
    """Linear, depthwise 3x3 convolution over the grid, GELU, linear; tokens to tokens.

    Args:
        width: C of the tokens (B, h*w, C).
        hidden: channels between the two linear layers.
        activate_before: ReLU before the convolution.
    """

    def __init__(self, width: int, hidden: int, activate_before: bool = False) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.contract = nn.Linear(hidden, width)
        self.activate_before = activate_before

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        hidden = self.expand(tokens)
        if self.activate_before:
            hidden = F.relu(hidden)
        hidden = self.depthwise(grid_from_tokens(hidden, grid))
        return self.contract(F.gelu(tokens_from_grid(hidden)))


def grid_from_tokens(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, h*w, C) -> (B, C, h, w), a view."""
    # Transposing first would leave a lone image a stride by which convolutions do not see that the
    # channels come last, and copy it.
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def tokens_from_grid(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C), a view."""
    return features.flatten(2).transpose(1, 2)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads), head j owning the j-th run of channels; a view."""
    return tokens.unflatten(2, (num_heads, -1)).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return tokens.transpose(1, 2).flatten(2)


def resize(features: Tensor, size: Grid) -> Tensor:
    """Bilinear resize of (B, C, h, w) to a grid, corners not aligned."""
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


def initialise_linear(module: nn.Module) -> None:
    """Initial weights of a module if it is a linear layer, as vision transformers draw them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

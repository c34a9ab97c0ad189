"""Attention of RTFormer (2210.07124): in the low branch, and between the two resolutions.

The low branch's four kinds are those of the paper's ablation. All take a map (B, C_in, h, w) and
give one of C_out channels; where C_in and C_out differ, at half the resolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.networks.batch_norm import BatchNorm
from segtrain.networks.blocks import grid_from_tokens, merge_heads, split_heads, tokens_from_grid

#: Side of the grid of keys of `LinformerAttention`: 256 of them, Linformer's own choice.
LINFORMER_GRID = 16


class GPUFriendlyAttention(nn.Module):
    """Attention to learnt keys and values, doubly normalised in groups (section 3.2.1).

    The logits are not divided among heads, so that both products stay whole matrices; groups of
    external tokens take the place of heads in the second normalisation.

    Args:
        in_channels, out_channels: C_in and C_out; there are C_out external tokens.
        num_heads: groups of the external tokens.
    """

    def __init__(self, in_channels: int, out_channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.stride = _stride(in_channels, out_channels)
        self.norm = BatchNorm(in_channels)
        self.key = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        self.value = nn.Parameter(torch.empty(out_channels, out_channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h', w')."""
        logits = F.conv2d(self.norm(features), self.key, stride=self.stride)
        groups = logits.flatten(2).unflatten(1, (self.num_heads, -1))
        weights = normalise_doubly(groups, tokens=2).flatten(1, 2)
        return F.conv2d(weights.unflatten(2, logits.shape[2:]), self.value)


class ExternalAttention(nn.Module):
    """Multi-head attention to learnt keys and values (External Attention, 2105.02358).

    The paper compares with M = ratio * C_out external tokens and names no further detail. As in
    External Attention's multi-head form, projections stand before and behind, and the heads share
    the external tokens.

    Args:
        in_channels, out_channels: C_in and C_out.
        num_heads: heads that share the channels out.
        ratio: external tokens for each output channel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_heads: int, ratio: float = 1.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        tokens, head_width = max(1, round(ratio * out_channels)), out_channels // num_heads
        self.norm = BatchNorm(in_channels)
        stride = _stride(in_channels, out_channels)
        self.query = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.key = nn.Parameter(torch.empty(tokens, head_width))
        self.value = nn.Parameter(torch.empty(tokens, head_width))
        self.projection = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h', w')."""
        queries = self.query(self.norm(features))
        logits = split_heads(tokens_from_grid(queries), self.num_heads) @ self.key.T
        weights = normalise_doubly(logits.transpose(2, 3), tokens=2).transpose(2, 3)
        attended = grid_from_tokens(merge_heads(weights @ self.value), _size(queries))
        return self.projection(attended)


class SelfAttention(nn.Module):
    """Multi-head self-attention; the paper names no detail, so the usual three projections.

    Args:
        in_channels, out_channels: C_in and C_out.
        num_heads: heads that share the channels out.
    """

    def __init__(self, in_channels: int, out_channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = BatchNorm(in_channels)
        stride = _stride(in_channels, out_channels)
        self.query = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.key_value = nn.Conv2d(in_channels, 2 * out_channels, 1, stride, bias=False)
        self.projection = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h', w')."""
        features = self.norm(features)
        queries = self.query(features)
        keys, values = tokens_from_grid(self.sources(self.key_value(features))).chunk(2, dim=2)
        attended = F.scaled_dot_product_attention(
            split_heads(tokens_from_grid(queries), self.num_heads),
            split_heads(keys, self.num_heads),
            split_heads(values, self.num_heads),
        )
        return self.projection(grid_from_tokens(merge_heads(attended), _size(queries)))

    def sources(self, keys_and_values: Tensor) -> Tensor:
        """What is attended to, of the keys and values at all positions (B, 2*C_out, h', w')."""
        return keys_and_values


class LinformerAttention(SelfAttention):
    """Self-attention to a fixed number of keys (Linformer, 2006.04768).

    A learnt projection over positions would tie the network to one image size. Linformer's section
    4 allows a mean pool in its place, here onto 16 x 16 positions, or all of a smaller map.
    """

    def sources(self, keys_and_values: Tensor) -> Tensor:
        """(B, 2*C_out, h', w') -> (B, 2*C_out, min(h', 16), min(w', 16))."""
        height, width = _size(keys_and_values)
        grid = min(height, LINFORMER_GRID), min(width, LINFORMER_GRID)
        return F.adaptive_avg_pool2d(keys_and_values, grid)


class CrossResolutionAttention(nn.Module):
    """The high branch attends to a small grid of the low branch's features (section 3.2.2).

    One head, and queries without a projection.

    Args:
        high_channels: C_h.
        low_channels: C_l.
    """

    def __init__(self, high_channels: int, low_channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(high_channels)
        self.low_norm = BatchNorm(low_channels)
        self.key_value = nn.Conv2d(low_channels, 2 * high_channels, 1, bias=False)

    def forward(self, high: Tensor, low: Tensor, cross_size: int) -> Tensor:
        """(B, C_h, H, W), (B, C_l, h, w) and the side of the grid -> (B, C_h, H, W)."""
        grid = F.adaptive_max_pool2d(self.low_norm(low), cross_size)
        keys, values = tokens_from_grid(self.key_value(grid)).chunk(2, dim=2)
        queries = tokens_from_grid(self.norm(high))
        # By the number of keys, and not by their channels.
        scale = 1 / cross_size
        attended = F.scaled_dot_product_attention(
            queries[:, None], keys[:, None], values[:, None], scale=scale
        )
        return grid_from_tokens(attended[:, 0], _size(high))


def normalise_doubly(logits: Tensor, tokens: int) -> Tensor:
    """Softmax over the positions (the last axis), then shares over the tokens (another axis).

    Computed in float32 at least: the shares are quotients of numbers around 1 / positions.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    weights = logits.softmax(dim=-1, dtype=precise)
    return (weights / (weights.sum(dim=tokens, keepdim=True) + 1e-6)).to(logits.dtype)


def _stride(in_channels: int, out_channels: int) -> int:
    return 1 if in_channels == out_channels else 2


def _size(features: Tensor) -> tuple[int, int]:
    return features.shape[2], features.shape[3]

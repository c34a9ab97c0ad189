"""Swin transformers of timm, made to compute what the authors' code does on images of any size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from segtrain.networks.blocks import Grid

#: Added to the logits of positions that only the roll has brought into the same window.
APART = -100.0


class WindowBlock(nn.Module):
    """A block of timm that pads maps before it rolls them, as the authors' code does (2103.14030).

    Zeros at the bottom and on the right fill the last windows, and are attended to; then the maps
    are rolled by the shift. timm rolls first, which is the same on maps of whole windows alone.

    Args:
        block: whose layers it takes over, by their names. It was built with ``always_partition``,
            so that windows have their full size and odd blocks a shift on small maps, too.
    """

    attn: Any
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: SwinTransformerBlock) -> None:
        super().__init__()
        self.window: Grid = block.window_size
        self.shift: Grid = block.shift_size
        for name, module in block.named_children():
            self.add_module(name, module)
        self.attn.fused_attn = True  # as fast in training and faster in inference

    @property
    def shifted(self) -> bool:
        return any(self.shift)

    def forward(self, maps: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, h, w, C), and their `window_mask` if they are shifted -> (B, h, w, C)."""
        maps = maps + self.drop_path1(self._attend(self.norm1(maps), mask))
        return maps + self.drop_path2(self.mlp(self.norm2(maps)))

    def _attend(self, maps: Tensor, mask: Tensor | None) -> Tensor:
        height, width = maps.shape[1:3]
        rows, columns = in_whole_windows((height, width), self.window)
        maps = F.pad(maps, (0, 0, 0, columns - width, 0, rows - height))
        if self.shifted:
            maps = maps.roll((-self.shift[0], -self.shift[1]), dims=(1, 2))
        windows = window_partition(maps, self.window).flatten(1, 2)
        windows = self.attn(windows, mask).unflatten(1, self.window)
        maps = window_reverse(windows, self.window, rows, columns)
        if self.shifted:
            maps = maps.roll(self.shift, dims=(1, 2))
        return maps[:, :height, :width]


class SwinPyramid(nn.Module):
    """Images (B, 3, H, W), sides multiples of 32 -> maps (B, C_i, H/s, W/s), s = 4, 8, 16, 32.

    Each map is normed by a layer of its own, which no pretrained weights have; the next stage goes
    on from the map as it was before.

    Args:
        swin: timm's SwinTransformer of four stages, whose layers it takes over.

    Attributes:
        widths: the four C_i.
    """

    def __init__(self, swin: Any) -> None:
        super().__init__()
        swin.norm = nn.Identity()
        swin.head = nn.Identity()
        for stage in swin.layers:
            stage.blocks = nn.ModuleList(WindowBlock(block) for block in stage.blocks)
        self.backbone = swin
        self.widths: tuple[int, ...] = tuple(info["num_chs"] for info in swin.feature_info)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone.patch_embed(images)
        normed = []
        for stage, norm in zip(self.backbone.layers, self.norms, strict=True):
            maps = stage.downsample(maps)
            mask: Tensor | None = None  # the same in all shifted blocks of a stage
            for block in stage.blocks:
                if block.shifted and mask is None:
                    mask = window_mask(maps, block.window, block.shift)
                maps = block(maps, mask if block.shifted else None)
            normed.append(norm(maps).permute(0, 3, 1, 2))
        return normed


def in_whole_windows(grid: Grid, window: Grid) -> Grid:
    """The sides of a map once it is padded to whole windows."""
    (height, width), (window_height, window_width) = grid, window
    return (
        -(-height // window_height) * window_height,
        -(-width // window_width) * window_width,
    )


def window_mask(maps: Tensor, window: Grid, shift: Grid) -> Tensor:
    """What is added to the logits in windows of shifted maps: 0 or `APART`, (windows, N, N).

    The roll brings the first rows and columns behind the last ones: there, what comes from one end
    of the padded map does not attend to what comes from the other.

    Args:
        maps: (B, h, w, C), not padded.
        window: height and width, of N positions.
        shift: rows and columns of the roll.
    """
    height, width = in_whole_windows((maps.shape[1], maps.shape[2]), window)
    rows = _ends(height, window[0], shift[0], maps.device)
    columns = _ends(width, window[1], shift[1], maps.device)
    regions = window_partition((3 * rows[:, None] + columns)[None, ..., None], window).flatten(1)
    apart = regions[:, :, None] != regions[:, None]
    return torch.zeros_like(apart, dtype=maps.dtype).masked_fill(apart, APART)


def _ends(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Of each row after the roll: 2 if it comes from the other end, else 1 in the last window."""
    places = torch.arange(side, device=device)
    return (places >= side - window).long() + (places >= side - shift).long()

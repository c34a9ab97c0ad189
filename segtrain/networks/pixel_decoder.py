"""The pixel decoder of Mask2Former (2112.01527), fed scale by scale as PRO-SCALE does (2404.14657).

Mask2Former's is the one whose layers all belong to the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.errors import UserError
from segtrain.networks.blocks import Grid, grid_from_tokens, resize, tokens_from_grid
from segtrain.networks.deformable_attention import DeformableAttention, reference_points
from segtrain.networks.exit_gate import ExitGate
from segtrain.networks.recalibration import Recalibration, TokenRecalibration

PixelEmbedding = Literal["convolution", "max_pool"]
NUM_GROUPS = 32  # of the group norms


class PixelFeatures(NamedTuple):
    """What queries look at and are compared with.

    Attributes:
        pixels: (B, d, H/4, W/4), embeddings that masks are products with.
        levels: (B, d, H/s, W/s) at s = 32, 16, 8.
    """

    pixels: Tensor
    levels: list[Tensor]


class EncoderLayer(nn.Module):
    """Deformable attention and an MLP, each with a norm behind its residual.

    Args:
        width: d of the tokens.
        num_heads: of the attention.
        mlp_width: between the two linear layers.
        num_levels: that the tokens are of.
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int, num_levels: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, num_heads, num_levels)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, mlp_width)
        self.linear2 = nn.Linear(mlp_width, width)
        self.norm2 = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self, tokens: Tensor, positions: Tensor, references: Tensor, grids: Sequence[Grid]
    ) -> Tensor:
        """(B, T, d), the positions added for queries, x and y of all tokens -> (B, T, d)."""
        attended = self.attention(tokens + positions, tokens, references, grids)
        tokens = self.norm1(tokens + attended)
        return self.norm2(tokens + self.linear2(F.relu(self.linear1(tokens))))


class PixelDecoder(nn.Module):
    """Maps at strides 4 to 32 -> `PixelFeatures`.

    Args:
        in_widths: channels of the maps, the finest first.
        width: d of all that is made of them.
        num_heads: of the attention.
        mlp_width: of the encoder's layers.
        encoder_layers: how many update the tokens at stride 32 alone; those at 32 and 16; all.
        recalibration: how stage inputs are weighed by the finest tokens; None does not.
        temperature: of the recalibration.
        pixel_embedding: what smooths the map at stride 4: a 3x3 convolution, or in its place a 3x3
            max pool, PRO-SCALE's light pixel embedding.
        residual: whether a stage's input is added behind each layer of the first two stages.
        exits: layers of the last stage after which a gate may stop, ascending; None has no gate.
    """

    def __init__(
        self,
        in_widths: Sequence[int],
        width: int,
        num_heads: int,
        mlp_width: int,
        encoder_layers: Sequence[int],
        recalibration: Recalibration | None,
        temperature: float,
        pixel_embedding: PixelEmbedding,
        residual: bool,
        exits: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder_layers = tuple(encoder_layers)
        self.residual = residual
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1), nn.GroupNorm(NUM_GROUPS, width))
            for channels in reversed(in_widths[1:])
        )
        self.level_embedding = nn.Parameter(torch.randn(3, width))
        self.recalibration = (
            None if recalibration is None else TokenRecalibration(width, recalibration, temperature)
        )
        self.layers = nn.ModuleList(
            EncoderLayer(width, num_heads, mlp_width, num_levels)
            for num_levels, count in enumerate(encoder_layers, start=1)
            for _ in range(count)
        )
        self.gate = None if exits is None else ExitGate(width, exits)
        self.lateral = nn.Sequential(
            nn.Conv2d(in_widths[0], width, 1, bias=False), nn.GroupNorm(NUM_GROUPS, width)
        )
        smoothing = (
            nn.MaxPool2d(3, stride=1, padding=1)
            if pixel_embedding == "max_pool"
            else nn.Conv2d(width, width, 3, padding=1, bias=False)
        )
        self.output = nn.Sequential(smoothing, nn.GroupNorm(NUM_GROUPS, width), nn.ReLU())
        self.mask_projection = nn.Conv2d(width, width, 1)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.input_projections.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for convolution in (self.lateral[0], self.output[0], self.mask_projection):
            if isinstance(convolution, nn.Conv2d):
                nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_projection.bias)  # type: ignore[arg-type]

    def forward(
        self, maps: Sequence[Tensor], layers_run: Sequence[int], gated: bool = False
    ) -> PixelFeatures:
        """Maps (B, C, H/s, W/s), the finest first -> `PixelFeatures`.

        Args:
            layers_run: of each stage, so many layers run, the first ones.
            gated: whether the gate chooses how many run of the last stage; one image at a time.
        """
        finest, *coarse = maps
        levels = [
            projection(level)
            for projection, level in zip(self.input_projections, reversed(coarse), strict=True)
        ]
        grids: list[Grid] = [(level.shape[2], level.shape[3]) for level in levels]
        if gated:
            assert self.gate is not None
            layers_run = (*layers_run[:2], self.gate.choose(levels[0]))
        tokens = self._encode([tokens_from_grid(level) for level in levels], grids, layers_run)
        encoded = [
            grid_from_tokens(level, grid)
            for level, grid in zip(tokens.split([h * w for h, w in grids], 1), grids, strict=True)
        ]
        lateral = self.lateral(finest)
        pixels = lateral + resize(encoded[2], (lateral.shape[2], lateral.shape[3]))
        return PixelFeatures(self.mask_projection(self.output(pixels)), encoded)

    def _encode(
        self, levels: Sequence[Tensor], grids: Sequence[Grid], layers_run: Sequence[int]
    ) -> Tensor:
        """Tokens (B, h*w, d) of each level, the coarsest first -> (B, T, d) of all levels."""
        like = levels[0]
        positions = torch.cat(
            [
                sine_positions(grid, like.shape[2], like.device).to(like.dtype) + embedding
                for grid, embedding in zip(grids, self.level_embedding, strict=True)
            ]
        )
        references = torch.cat([reference_points(grid, like.device) for grid in grids])
        tokens = like[:, :0]
        inputs = like[:, :0]
        for stage, built in enumerate(self.encoder_layers):
            added = levels[stage]
            if stage < 2 and self.recalibration is not None:
                added = self.recalibration(added, levels[2], grids[stage], grids[2])
            tokens = torch.cat([tokens, added], dim=1)
            if self.residual:
                inputs = torch.cat([inputs, added], dim=1)
            first, count = sum(self.encoder_layers[:stage]), tokens.shape[1]
            for layer in self.layers[first : first + built][: layers_run[stage]]:
                tokens = layer(tokens, positions[:count], references[:count], grids[: stage + 1])
                if self.residual and stage < 2:
                    tokens = tokens + inputs
        return tokens


def sine_positions(grid: Grid, width: int, device: torch.device) -> Tensor:
    """(h*w, width) sines and cosines of the row, then of the column (DETR, 2005.12872, A.4)."""
    half = width // 2
    exponents = torch.arange(half, device=device, dtype=torch.float32).div(2).floor() * 2 / half
    parts = []
    for length, other in (grid, grid[::-1]):
        steps = torch.arange(1, length + 1, device=device, dtype=torch.float32)
        angles = (steps / (length + 1e-6) * (2 * math.pi))[:, None] / 10000**exponents
        waves = torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)
        parts.append(waves[:, None].expand(-1, other, -1))
    rows, columns = parts
    return torch.cat([rows, columns.transpose(0, 1)], dim=2).flatten(0, 1)


def check_layers(name: str, layers: Sequence[int]) -> None:
    """Raise UserError unless it is three whole numbers that are not negative."""
    if len(layers) != 3 or any(type(count) is not int or count < 0 for count in layers):
        raise UserError(
            f"'{name}' counts the layers at stride 32, at 32 and 16, and at 32, 16 and 8, as in "
            f"[3, 3, 3]; not {list(layers)}"
        )

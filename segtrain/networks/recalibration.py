"""Token re-calibration (PRO-SCALE, 2404.14657): fine tokens weigh coarse ones."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from segtrain.networks.blocks import Grid, resize

Recalibration = Literal["linear", "convolution"]


class TokenRecalibration(nn.Module):
    """Multiplies every coarse token by sigmoid(temperature * what the finest tokens say there).

    The published code reads the memory of tokens (B, N, d) as maps (B, d, h, w) without
    transposing it, so that "there" is another place in both. Published weights are trained so, and
    depend on it.

    Args:
        width: d of the tokens.
        kind: whether a linear layer reads the resized memory as tokens again, or a 1x1 convolution
            reads it as maps and weighs those.
        temperature: T; below 1 it keeps the weights near one half.
    """

    def __init__(self, width: int, kind: Recalibration, temperature: float) -> None:
        super().__init__()
        self.kind = kind
        self.temperature = temperature
        self.gate = nn.Linear(width, 1) if kind == "linear" else nn.Conv2d(width, 1, 1)

    def forward(self, tokens: Tensor, finest: Tensor, grid: Grid, finest_grid: Grid) -> Tensor:
        """(B, h*w, d), and the finest tokens (B, N, d) -> (B, h*w, d)."""
        batch, count, width = tokens.shape
        context = finest.reshape(batch, width, *finest_grid)
        context = resize(context, grid)
        if self.kind == "linear":
            gate = self.gate(context.reshape(batch, count, width))
            return tokens * (self.temperature * gate).sigmoid()
        gate = (self.temperature * self.gate(context)).sigmoid()
        return (tokens.reshape(batch, width, *grid) * gate).reshape(batch, count, width)

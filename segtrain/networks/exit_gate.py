"""The gate of ECO-M2F (2404.15244): how many encoder layers an image needs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ExitGate(nn.Module):
    """From the coarsest map, before the encoder, to one logit for each exit.

    Trained behind all else, on what `describe` gives of images (`segtrain.training.exit_gate`).

    Args:
        width: d of the map.
        exits: numbers of layers to choose from.
    """

    def __init__(self, width: int, exits: Sequence[int]) -> None:
        super().__init__()
        self.exits = tuple(exits)
        self.head = nn.Linear(width, len(self.exits))

    def forward(self, level: Tensor) -> Tensor:
        """(B, d, h, w) -> (B, exits)."""
        return self.head(self.describe(level))

    def describe(self, level: Tensor) -> Tensor:
        """(B, d, h, w) -> (B, d): all that the gate knows of an image, the mean of its tokens."""
        return level.mean(dim=(2, 3))

    def choose(self, level: Tensor) -> int:
        """(1, d, h, w) -> the number of layers; waits for the device."""
        return self.exits[int(self(level).argmax())]

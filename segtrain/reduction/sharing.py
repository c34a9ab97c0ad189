"""Token sharing of CTS (CVPR 2023): 2x2 patches of one class share one token from the start."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from segtrain.errors import UserError
from segtrain.reduction.setting import Setting

#: Patches of a superpatch along an axis.
SIDE = 2
#: The largest share of tokens that sharing can save: each superpatch is one token instead of four.
MOST_SAVED = 1 - 1 / SIDE**2


@dataclasses.dataclass(frozen=True)
class TokenSharing(Setting):
    """How many of an image's superpatches share a token; the same number for every image.

    Attributes:
        saved: the share of the patches' tokens that sharing saves, 3 for each shared superpatch:
            N patches have N - 3S tokens with S = ceil(saved * N / 3). 0 shares nothing and asks no
            policy. An image of few superpatches saves more than its share, as S is rounded up, and
            never more than 3/4.
    """

    saved: float

    def __post_init__(self) -> None:
        if isinstance(self.saved, bool) or not isinstance(self.saved, int | float):
            raise UserError(f"'saved' of a setting is a number, not {self.saved!r}")
        if not 0 <= self.saved <= MOST_SAVED:
            raise UserError(
                f"'saved' of a setting is at least 0 and at most {MOST_SAVED}, where every four "
                f"patches share one token, not {self.saved}"
            )

    def describe(self) -> str:
        """Such as ``shared_0.3``."""
        return f"shared_{self.saved:g}" if self.saved else "full"

    def count(self, superpatches: int) -> int:
        """S, of an image's superpatches."""
        # A multiple of 1/3 may come out a little too large.
        count = math.ceil(self.saved * superpatches / MOST_SAVED - 1e-9)
        return min(count, superpatches)


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Which patches of an image have a token of their own, and which superpatches share one.

    Tokens stand in the order: unshared patches row by row, shared superpatches row by row.

    Attributes:
        unshared: (B, N - 4S) patches, of the N of whole superpatches.
        shared: (B, S) superpatches.
        sources: (B, h * w), for every patch of the image the token that stands for it.
    """

    unshared: Tensor
    shared: Tensor
    sources: Tensor

    def select(self, patches: Tensor, superpatches: Tensor) -> Tensor:
        """Values of patches (B or 1, N, X) and superpatches (B or 1, N/4, X) -> (B, N - 3S, X)."""
        return torch.cat([take(patches, self.unshared), take(superpatches, self.shared)], dim=1)

    def restore(self, values: Tensor) -> Tensor:
        """Values of tokens (B, N - 3S, X) -> those of the image's patches (B, h * w, X)."""
        return take(values, self.sources)


def share_tokens(scores: Tensor, count: int, grid: tuple[int, int]) -> Sharing:
    """Share the tokens of each image's best superpatches; of equal ones, the first row by row.

    Args:
        scores: (B, ceil(h/2), ceil(w/2)), how surely each superpatch shows one class. N patches,
            four for each, have tokens.
        count: S.
        grid: patches (h, w) of the image; those beyond them, which fill superpatches, are padding.
    """
    batch, height, width = scores.shape
    ranked = scores.flatten(1).argsort(dim=1, descending=True, stable=True)
    shared = ranked[:, :count].sort(dim=1).values
    # Tokens of shared superpatches follow those of the unshared patches.
    first = (height * width - count) * SIDE**2
    tokens = torch.arange(first, first + count, device=scores.device).expand(batch, -1)
    no_token = shared.new_full((batch, height * width), -1)
    by_superpatch = no_token.scatter(1, shared, tokens).view(batch, height, width)
    by_patch = by_superpatch.repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2).flatten(1)
    is_shared = by_patch >= 0
    unshared = is_shared.to(torch.uint8).argsort(dim=1, stable=True)[:, :first]
    own = (~is_shared).cumsum(dim=1) - 1
    sources = torch.where(is_shared, by_patch, own).view(batch, SIDE * height, SIDE * width)
    return Sharing(unshared, shared, sources[:, : grid[0], : grid[1]].flatten(1))


def take(values: Tensor, indices: Tensor) -> Tensor:
    """Rows (B, T) of values (B or 1, N, X) -> (B, T, X)."""
    values = values.expand(len(indices), -1, -1)
    return values.gather(1, indices[:, :, None].expand(-1, -1, values.shape[2]))

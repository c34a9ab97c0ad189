"""SETR's decoder of several levels (2012.15840, section 3.3): multi-level feature aggregation."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segtrain.networks.up_head import (
    ConvolutionNormReLU,
    enlarge,
    initialise_classifier,
    norm_channels,
)

#: Of the branches' maps over the patches'.
SCALE = 4


class MLANeck(nn.Module):
    """Maps of several blocks, each with what is deeper added: (B, C, h, w) each -> (B, D, h, w).

    Args:
        in_channels: C.
        channels: D.
        levels: how many maps, from the shallowest to the deepest.
    """

    def __init__(self, in_channels: int, channels: int, levels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(in_channels, eps=1e-6) for _ in range(levels))
        self.projections = nn.ModuleList(
            ConvolutionNormReLU(in_channels, channels, kernel=1) for _ in range(levels)
        )
        self.extractions = nn.ModuleList(
            ConvolutionNormReLU(channels, channels, kernel=3) for _ in range(levels)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        projected = [
            projection(norm_channels(features, norm))
            for features, norm, projection in zip(maps, self.norms, self.projections, strict=True)
        ]
        sums = list(itertools.accumulate(reversed(projected), operator.add))[::-1]
        return [
            extraction(features)
            for features, extraction in zip(sums, self.extractions, strict=True)
        ]


class MLAHead(nn.Module):
    """A branch for each level of the neck, side by side, four times the size, classified.

    (B, D, h, w) for each level, the shallowest first -> scores (B, K, 4h, 4w). The authors align
    the corners of the upsampled maps, put the shallowest first and classify by a 3x3 convolution;
    OpenMMLab does not align them, puts the deepest first and takes a 1x1 convolution, which may as
    well come before the upsampling.

    Args:
        in_channels: D.
        num_classes: K.
        levels: how many.
        official: the authors' way, or else OpenMMLab's.
    """

    def __init__(self, in_channels: int, num_classes: int, levels: int, official: bool) -> None:
        super().__init__()
        channels = in_channels // 2
        self.branches = nn.ModuleList(
            nn.Sequential(
                ConvolutionNormReLU(in_channels, channels, kernel=3),
                ConvolutionNormReLU(channels, channels, kernel=3),
            )
            for _ in range(levels)
        )
        kernel = 3 if official else 1
        self.classifier = initialise_classifier(
            nn.Conv2d(levels * channels, num_classes, kernel, padding=kernel // 2)
        )
        self.official = official

    def forward(self, levels: Sequence[Tensor], as_published: bool = False) -> Tensor:
        """``as_published`` classifies behind the upsampling, which gives the same scores."""
        maps = [branch(level) for branch, level in zip(self.branches, levels, strict=True)]
        if self.official:
            return self.classifier(enlarge(torch.cat(maps, dim=1), SCALE, align_corners=True))
        features = torch.cat(maps[::-1], dim=1)
        if as_published:
            return self.classifier(enlarge(features, SCALE))
        return enlarge(self.classifier(features), SCALE)

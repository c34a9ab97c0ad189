"""A small network whose cost depends on the image."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from segtrain.networks import Network
from segtrain.reduction import Setting

WIDTH = 32


@dataclasses.dataclass(frozen=True)
class Threshold(Setting):
    """Where ``above``, tokens are passed that are surer than the threshold, otherwise the others:
    the cost rises with the threshold, or falls."""

    threshold: float | None = None
    above: bool = True

    @property
    def data_dependent(self):
        return self.threshold is not None

    @property
    def threshold_range(self):
        return (0.0, 1.0) if self.data_dependent else None

    def with_threshold(self, threshold):
        return self._renamed(threshold=threshold)


class Stopping(Network):
    """Patches of 8x8 pixels; only tokens that are not passed go through the hidden layer."""

    setting_type = Threshold

    def __init__(self, num_classes=4):
        settings = [Threshold("half", 0.5), Threshold("full"), Threshold("falling", 0.5, False)]
        super().__init__(num_classes, 8, settings)
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Conv2d(3, WIDTH, 8, 8)
        self.hidden = nn.Linear(WIDTH, WIDTH, bias=False)
        self.classifier = nn.Linear(WIDTH, num_classes)
        with torch.no_grad():
            self.embedding.weight.normal_(std=0.1, generator=generator)
            self.embedding.bias.zero_()

    def certainty(self, images):
        """(B, h, w), from 0 to 1."""
        return self.embedding(images)[:, 0].sigmoid()

    def forward(self, images):
        tokens = self.embedding(images).permute(0, 2, 3, 1)
        if self.setting.threshold is None:
            tokens = self.hidden(tokens)
        else:
            sure = tokens[..., 0].sigmoid() > self.setting.threshold
            left = ~sure if self.setting.above else sure
            tokens = tokens.clone()
            tokens[left] = self.hidden(tokens[left])
        return self.classifier(tokens).permute(0, 3, 1, 2)

"""Batch norm as Paddle trains it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The share of the batch in the running statistics; Paddle names the other share, 0.1.
MOMENTUM = 0.9


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that keeps the variance of the batch as it is, and takes a single value.

    torch keeps variances times n / (n - 1), for n values of a channel; Paddle does not, which shows
    where values are few. Where a channel has a single value (one image, one pixel), torch refuses
    to train. Here such a map is normalised by the running statistics, as in evaluation, and leaves
    them as they are: one value has no variance.

    Args:
        channels: C of the maps (B, C, h, w).
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps, momentum=MOMENTUM)

    def forward(self, features: Tensor) -> Tensor:
        values = features.numel() // features.shape[1]
        if not self.training or values == 1:
            return F.batch_norm(
                features, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        assert self.running_mean is not None
        assert self.running_var is not None
        # Copies, because the backward pass wants what batch norm has updated as it left it.
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        normalised = F.batch_norm(
            features, mean, variance, self.weight, self.bias, True, MOMENTUM, self.eps
        )
        with torch.no_grad():
            self.running_mean.copy_(mean)
            self.running_var.mul_((1 - MOMENTUM) / values).add_(variance, alpha=1 - 1 / values)
        return normalised

"""Heads of convolutions over a plain vision transformer's map, with upsampling in between."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.networks.blocks import grid_from_tokens, resize, tokens_from_grid


class ConvolutionNormReLU(nn.Sequential):
    """Convolution, batch norm, ReLU: (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, in_channels: int, channels: int, kernel: int, bias: bool = False) -> None:
        convolution = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=bias)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class UpHead(nn.Module):
    """SETR's naive and PUP decoders, and FCN's: convolutions, each upsampled, and a classifier.

    (B, C, h, w) -> scores (B, K, f*h, f*w), f being ``scale`` to the power of the upsamplings. A
    1x1 convolution after a bilinear resize is the resize after the convolution: the classifier
    comes before the last upsampling, on fewer pixels.

    Args:
        in_channels: C.
        channels: of the convolutions.
        num_classes: K.
        convolutions: how many precede the classifier.
        kernel: their size.
        scale: of the bilinear upsampling that follows each of them; 1 for none.
        norm: whether a layer norm over the channels comes first.
        bias: whether the convolutions have one, as the authors of SETR have it.
        upsample_last: whether an upsampling follows the last convolution, too.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        convolutions: int = 1,
        kernel: int = 1,
        scale: int = 4,
        norm: bool = True,
        bias: bool = False,
        upsample_last: bool = True,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels, eps=1e-6) if norm else nn.Identity()
        self.convolutions = nn.ModuleList(
            ConvolutionNormReLU(channels if i else in_channels, channels, kernel, bias)
            for i in range(convolutions)
        )
        self.classifier = initialise_classifier(nn.Conv2d(channels, num_classes, 1))
        self.scale = scale
        self.last_scale = scale if upsample_last else 1

    def forward(self, features: Tensor, as_published: bool = False) -> Tensor:
        """``as_published`` classifies behind the last upsampling, which gives the same scores."""
        features = norm_channels(features, self.norm)
        for index, convolution in enumerate(self.convolutions):
            if index:
                features = enlarge(features, self.scale)
            features = convolution(features)
        if as_published:
            return self.classifier(enlarge(features, self.last_scale))
        return enlarge(self.classifier(features), self.last_scale)


def norm_channels(features: Tensor, norm: nn.Module) -> Tensor:
    """A layer norm over the channels of (B, C, h, w), each position by itself."""
    grid = (features.shape[2], features.shape[3])
    return grid_from_tokens(norm(tokens_from_grid(features)), grid)


def enlarge(features: Tensor, scale: int, align_corners: bool = False) -> Tensor:
    """Bilinear resize of (B, C, h, w) to (B, C, scale*h, scale*w)."""
    if scale == 1:
        return features
    size = (scale * features.shape[2], scale * features.shape[3])
    if align_corners:
        return F.interpolate(features, size=size, mode="bilinear", align_corners=True)
    return resize(features, size)


def initialise_classifier(classifier: nn.Conv2d) -> nn.Conv2d:
    """The same, with initial weights as OpenMMLab's code draws them."""
    nn.init.normal_(classifier.weight, std=0.01)
    if classifier.bias is not None:
        nn.init.zeros_(classifier.bias)
    return classifier

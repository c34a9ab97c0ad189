"""The policy of CTS (CVPR 2023): which superpatches show one class."""

from __future__ import annotations

import timm
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from segtrain.errors import UserError, first_line
from segtrain.networks.network import Network
from segtrain.networks.plain_vit import to_half_range
from segtrain.networks.registry import register_network

#: Side of a superpatch in pixels: 2x2 patches of 16.
SUPERPATCH = 32
#: Channels of EfficientNet-Lite0's last map before its head.
WIDTH = 320


class SuperpatchPolicy(Network):
    """(B, 3, H, W) -> scores (B, K, ceil(H/32), ceil(W/32)), in training and evaluation alike.

    EfficientNet-Lite0 up to stride 32 and a 1x1 convolution. Images are padded to whole
    superpatches inside.

    Args:
        num_classes: K, 2 for a policy: superpatches of several labels, and of one. Label maps say
            so with ``data.superpatches``.
        pretrained: whether timm loads the encoder's ImageNet weights.

    Raises:
        UserError: timm cannot load its weights.
    """

    def __init__(self, num_classes: int, pretrained: bool = False) -> None:
        super().__init__(num_classes, SUPERPATCH)
        try:
            self.encoder = timm.create_model(
                "efficientnet_lite0", pretrained=pretrained, features_only=True, out_indices=(4,)
            )
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"timm cannot build 'efficientnet_lite0': {first_line(error)}"
            ) from error
        _separate_activations(self.encoder)
        self.decoder = nn.Conv2d(WIDTH, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        images = F.pad(to_half_range(images), (0, -width % SUPERPATCH, 0, -height % SUPERPATCH))
        return self.decoder(self.encoder(images)[-1])


def _separate_activations(module: nn.Module) -> None:
    """Let plain batch norms and their activations take the place of timm's layers of both.

    What makes batch norms share their statistics between processes would drop the activations.
    """
    for name, layer in list(module.named_children()):
        if isinstance(layer, BatchNormAct2d):
            norm = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum)
            norm.load_state_dict(layer.state_dict())
            setattr(module, name, nn.Sequential(norm, layer.act))
        else:
            _separate_activations(layer)


@register_network
def cts_policy(num_classes: int, pretrained: bool = False) -> SuperpatchPolicy:
    """2.96 M parameters with the policy's 2 classes."""
    return SuperpatchPolicy(num_classes, pretrained)

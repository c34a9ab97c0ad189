"""PRO-SCALE (ICLR 2025, 2404.14657): Mask2Former whose encoder is fed scale by scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from segtrain.networks.mask2former import Mask2Former, variant
from segtrain.networks.registry import register_network

#: What the published configurations have in the place of Mask2Former's.
PUBLISHED: Mapping[str, Any] = {
    "encoder_layers": (3, 3, 3),
    "recalibration": "linear",
    "pixel_embedding": "max_pool",
}


@register_network
def proscale_r50(num_classes: int, **arguments: Any) -> Mask2Former:
    """ResNet-50: 45.4 M parameters."""
    return variant("r50", num_classes, {**PUBLISHED, **arguments})


@register_network
def proscale_r101(num_classes: int, **arguments: Any) -> Mask2Former:
    """ResNet-101."""
    return variant("r101", num_classes, {**PUBLISHED, **arguments})


@register_network
def proscale_swin_t(num_classes: int, **arguments: Any) -> Mask2Former:
    """Swin-T: 48.8 M parameters."""
    return variant("swin_t", num_classes, {**PUBLISHED, **arguments})


@register_network
def proscale_swin_s(num_classes: int, **arguments: Any) -> Mask2Former:
    """Swin-S."""
    return variant("swin_s", num_classes, {**PUBLISHED, **arguments})


@register_network
def proscale_swin_b(num_classes: int, **arguments: Any) -> Mask2Former:
    """Swin-B."""
    return variant("swin_b", num_classes, {**PUBLISHED, **arguments})


@register_network
def proscale_swin_l(num_classes: int, **arguments: Any) -> Mask2Former:
    """Swin-L."""
    return variant("swin_l", num_classes, {**PUBLISHED, **arguments})

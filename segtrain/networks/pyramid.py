"""Encoders whose maps halve from stage to stage, by their timm names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from segtrain.errors import UserError, did_you_mean, first_line
from segtrain.networks.swin import SwinPyramid, WindowBlock

BatchNorms = Literal["frozen", "trained"]
BATCH_NORMS = ("frozen", "trained")
STRIDES = (4, 8, 16, 32)
#: The modules that repeat in the encoders, for a network's ``block_types``.
BLOCK_TYPES: tuple[type[nn.Module], ...] = (WindowBlock, BasicBlock, Bottleneck)


class FrozenBatchNorm(nn.Module):
    """Batch norm whose scale, shift and statistics are buffers, which training leaves as they are.

    Args:
        norm: whose values and names it takes over, and the activation that timm's may hold.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach())
        for name, module in norm.named_children():
            self.add_module(name, module)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w), of the same type."""
        if features.requires_grad:
            # A product with what does not learn need not keep the features for the backward pass.
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            scaled = torch.addcmul(shift[:, None, None], features, scale[:, None, None])
            features = scaled.to(features.dtype)
        else:
            features = F.batch_norm(
                features, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        for module in self.children():
            features = module(features)
        return features


class Pyramid(nn.Module):
    """Images (B, 3, H, W), sides multiples of 32 -> maps (B, C_i, H/s, W/s), s = 4, 8, 16, 32.

    Args:
        backbone: timm's, built to give four maps.

    Attributes:
        widths: the four C_i.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.widths: tuple[int, ...] = tuple(backbone.feature_info.channels())

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone(images)
        if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":
            maps = [each.permute(0, 3, 1, 2) for each in maps]
        return list(maps)


def create_pyramid(
    backbone: str,
    *,
    pretrained: bool = False,
    drop_path: float = 0.0,
    batch_norm: BatchNorms = "frozen",
    backbone_arguments: Mapping[str, Any] | None = None,
) -> Pyramid | SwinPyramid:
    """An encoder with maps at strides 4, 8, 16 and 32.

    Args:
        backbone: timm's name, such as ``resnet50`` or ``swin_tiny_patch4_window7_224``, with the
            tag of weights or without.
        pretrained: whether timm loads its weights.
        drop_path: rate of the last block; the rates rise linearly from 0.
        batch_norm: ``frozen`` (scale, shift and statistics stay as they are) or ``trained``.
        backbone_arguments: what timm's constructor takes, such as ``embed_dim`` or ``depths``.

    Raises:
        UserError: timm has no such network, or cannot build it or load its weights, or its maps are
            at other strides, or another argument is not of its kind.
    """
    arguments = dict(backbone_arguments or {})
    for name in arguments:
        if name in OWN_ARGUMENTS or (_is_swin(backbone) and name in SWIN_ARGUMENTS):
            raise UserError(f"backbone_arguments: '{name}' is the network's own, or not to be had")
    if batch_norm not in BATCH_NORMS:
        raise UserError(
            f"there is no batch norm '{batch_norm}': {did_you_mean(batch_norm, BATCH_NORMS)}"
        )
    if drop_path:  # not all of timm's networks know it
        arguments["drop_path_rate"] = drop_path
    network = _create(backbone, pretrained, arguments)
    if not drop_path:
        for module in network.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0  # some of timm's networks drop unless they are told
    if batch_norm == "frozen":
        _freeze(network, learnt=pretrained)
    return SwinPyramid(network) if _is_swin(backbone) else Pyramid(network)


#: What all backbones are told by `create_pyramid`, under its names or timm's.
OWN_ARGUMENTS = {
    *inspect.signature(create_pyramid).parameters,
    "drop_path_rate",
    "features_only",
    "out_indices",
}
#: What a Swin is told beside that: no classes, images of any size, windows of one size.
SWIN_ARGUMENTS = {"num_classes": 0, "strict_img_size": False, "always_partition": True}


def _is_swin(backbone: str) -> bool:
    return timm.models.is_model_in_modules(backbone.partition(".")[0], ["swin_transformer"])


def _create(backbone: str, pretrained: bool, arguments: Mapping[str, Any]) -> Any:
    name, _, _ = backbone.partition(".")  # a tag names weights
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(
            f"timm has no network '{backbone}'"
            + (f"; near are: {', '.join(near)}" if near else "")
            + "; timm.list_models() names them all"
        )
    ours = {"features_only": True, "out_indices": (-4, -3, -2, -1)}
    given: dict[str, Any] = {**arguments, **(SWIN_ARGUMENTS if _is_swin(backbone) else ours)}
    try:
        network: Any = timm.create_model(backbone, pretrained=pretrained, **given)
    except (AssertionError, RuntimeError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f"timm cannot build '{backbone}' with maps at strides 4, 8, 16, 32: {first_line(error)}"
        ) from error
    maps = network.feature_info if _is_swin(backbone) else network.feature_info.get_dicts()
    strides = tuple(each["reduction"] for each in maps)
    if strides != STRIDES:
        raise UserError(
            f"'{backbone}' has maps at strides {', '.join(map(str, strides))}, not 4, 8, 16, 32"
        )
    return network


def _freeze(network: nn.Module, learnt: bool) -> None:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                if not learnt and not child.weight.is_meta and not child.weight.any():
                    # timm lets the last norm of a block learn from zero; this one would stay there.
                    nn.init.ones_(child.weight)
                setattr(module, name, FrozenBatchNorm(child))

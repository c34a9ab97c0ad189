"""RTFormer (NeurIPS 2022, 2210.07124): two resolutions, and attention that suits a GPU."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from segtrain.errors import UserError, did_you_mean
from segtrain.networks.batch_norm import BatchNorm
from segtrain.networks.blocks import resize
from segtrain.networks.gpu_friendly_attention import (
    CrossResolutionAttention,
    ExternalAttention,
    GPUFriendlyAttention,
    LinformerAttention,
    SelfAttention,
)
from segtrain.networks.network import Network
from segtrain.networks.registry import register_network
from segtrain.reduction import Setting

#: (kernel, stride) of the average pools of the context; a global one follows.
POOLS = ((5, 2), (9, 4), (17, 8))
LOW_ATTENTION: dict[str, Callable[..., nn.Module]] = {
    "gfa": GPUFriendlyAttention,
    "external": ExternalAttention,
    "self": SelfAttention,
    "linformer": LinformerAttention,
}
HEADS = ("segmentation", "classification")

#: (B, C_in, h, w) -> (B, C_out, h', w').
Attention = Callable[[int, int], nn.Module]


@dataclasses.dataclass(frozen=True)
class RTFormerReduction(Setting):
    """Smaller images, or fewer keys of the cross-resolution attention.

    The paper has no reduction at inference. Scores at another image scale are what the authors'
    multi-scale test takes; ``cross_size`` is an argument of their constructor, and switching it
    under the same weights is ours.

    Attributes:
        scale: of both sides of the image, which is resized bilinearly first.
        cross_size: side of the grid of keys; None for the one that the network was created with.
            The softmax is scaled by 1 / cross_size, as by the authors' constructor.
    """

    scale: float = 1.0
    cross_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
            raise UserError(f"'scale' of a setting is a number, not {self.scale!r}")
        if not 0 < self.scale <= 4:
            raise UserError(f"'scale' of a setting is above 0 and at most 4, not {self.scale}")
        if self.cross_size is not None and not _is_size(self.cross_size):
            raise UserError(
                f"'cross_size' of a setting is a whole number above 0, or null for the network's "
                f"own, not {self.cross_size!r}"
            )

    def describe(self) -> str:
        """Such as ``scale_0.5_cross_4``."""
        parts = [f"scale_{self.scale:g}"] if self.scale != 1 else []
        parts += [f"cross_{self.cross_size}"] if self.cross_size is not None else []
        return "_".join(parts) or "full"


def published_settings() -> list[RTFormerReduction]:
    """All ours but the first."""
    values: list[dict[str, Any]] = [{}, {"cross_size": 4}, {"cross_size": 1}]
    values += [{"scale": scale} for scale in (0.875, 0.75, 0.625, 0.5)]
    return [RTFormerReduction.from_values(fields) for fields in values]


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def norm_relu_convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1
) -> nn.Sequential:
    """Batch norm, ReLU and a convolution without bias, which halves the sides at stride 2."""
    return nn.Sequential(
        BatchNorm(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
    )


class BasicBlock(nn.Module):
    """ResNet's residual block of two 3x3 convolutions.

    Args:
        in_channels, out_channels: of the maps.
        stride: of the first convolution.
        activate: whether a ReLU ends the block.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, activate: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = BatchNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(out_channels)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                BatchNorm(out_channels),
            )
        self.activate = activate

    def forward(self, features: Tensor) -> Tensor:
        shortcut = features if self.shortcut is None else self.shortcut(features)
        features = F.relu(self.norm1(self.conv1(features)))
        features = self.norm2(self.conv2(features)) + shortcut
        return F.relu(features) if self.activate else features


def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Two residual blocks, the second without its ReLU."""
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride),
        BasicBlock(out_channels, out_channels, activate=False),
    )


class MLP(nn.Module):
    """The block's feed-forward part: two 3x3 convolutions of one width (section 3.2)."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm = BatchNorm(channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.dropout(F.gelu(self.conv1(self.norm(features))))
        return self.dropout(self.conv2(hidden))


class RTFormerBlock(nn.Module):
    """Attention and MLP in both branches, which exchange what they have found (figure 2).

    Args:
        high_channels: C_h of the high branch.
        in_channels, out_channels: C_in and C_out of the low branch; where they differ, it halves
            its sides.
        attention: builds the low branch's, from C_in and C_out.
        injection: whether the high branch's result goes back into the low branch.
        drop_path: rate of dropping each of the four residual branches, for each image.
        dropout: rate inside the MLPs.
    """

    def __init__(
        self,
        high_channels: int,
        in_channels: int,
        out_channels: int,
        attention: Attention,
        injection: bool,
        drop_path: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.low_shortcut: nn.Sequential | None = None
        if in_channels != out_channels:
            self.low_shortcut = nn.Sequential(
                BatchNorm(in_channels), nn.Conv2d(in_channels, out_channels, 1, 2, bias=False)
            )
        self.low_attention = attention(in_channels, out_channels)
        self.low_mlp = MLP(out_channels, dropout)
        self.compression = norm_relu_convolution(out_channels, high_channels, 1)
        self.high_attention = CrossResolutionAttention(high_channels, out_channels)
        self.high_mlp = MLP(high_channels, dropout)
        self.injection: nn.Sequential | None = None
        if injection:
            self.injection = nn.Sequential(
                *norm_relu_convolution(high_channels, out_channels // 2, 3, stride=2),
                *norm_relu_convolution(out_channels // 2, out_channels, 3, stride=2),
            )
        self.drop_path = DropPath(drop_path)

    def forward(self, high: Tensor, low: Tensor, cross_size: int) -> tuple[Tensor, Tensor]:
        """(B, C_h, H, W) and (B, C_in, h, w) -> (B, C_h, H, W) and (B, C_out, h', w')."""
        shortcut = low if self.low_shortcut is None else self.low_shortcut(low)
        low = shortcut + self.drop_path(self.low_attention(low))
        low = low + self.drop_path(self.low_mlp(low))
        high = high + resize(self.compression(low), (high.shape[2], high.shape[3]))
        high = high + self.drop_path(self.high_attention(high, low, cross_size))
        high = high + self.drop_path(self.high_mlp(high))
        return high, low if self.injection is None else low + self.injection(high)


class Encoder(nn.Module):
    """Stem, residual stages that split into two resolutions, and two blocks (section 3.3).

    Args:
        channels: c; the stages have c, 2c and 4c, the high branch 2c, the low one 8c.
        attention: of the low branch, from its channels before and behind.
        injection: whether each block's high branch goes back into its low one.
        drop_path: rate of all the blocks' residual branches.
        dropout: rate inside the blocks' MLPs.
    """

    def __init__(
        self,
        channels: int,
        attention: Attention,
        injection: Sequence[bool],
        drop_path: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, channels, 3, 2, padding=1), BatchNorm(channels), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, 2, padding=1), BatchNorm(channels), nn.ReLU()),
        )
        self.stage1 = stage(channels, channels, stride=1)
        self.stage2 = stage(channels, 2 * channels, stride=2)
        self.stage3 = stage(2 * channels, 4 * channels, stride=2)
        self.compression = norm_relu_convolution(4 * channels, 2 * channels, 1)
        self.high = nn.Sequential(BasicBlock(2 * channels, 2 * channels))
        block = functools.partial(
            RTFormerBlock,
            2 * channels,
            out_channels=8 * channels,
            attention=attention,
            drop_path=drop_path,
            dropout=dropout,
        )
        self.block4 = block(4 * channels, injection=injection[0])
        self.block5 = block(8 * channels, injection=injection[1])

    def forward(self, images: Tensor, cross_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the high branch begins with, (B, 2c, H/8, W/8), and both branches' ends.

        The ends are (B, 2c, H/8, W/8) and (B, 8c, H/32, W/32).
        """
        first = self.stage1(self.stem(images))
        second = self.stage2(F.relu(first))
        third = self.stage3(F.relu(second))
        size = (second.shape[2], second.shape[3])
        early = self.high(F.relu(second + resize(self.compression(third), size)))
        high, low = self.block4(F.relu(early), F.relu(third), cross_size)
        high, low = self.block5(F.relu(high), F.relu(low), cross_size)
        return early, high, low


class Context(nn.Module):
    """DAPPM, the context module of DDRNet (2101.06085, section 3.4).

    The pools' averages count the zeros of the padding.

    Args:
        in_channels, channels, out_channels: before, inside and behind.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int) -> None:
        super().__init__()
        branches = len(POOLS) + 2
        self.branches = nn.ModuleList(
            norm_relu_convolution(in_channels, channels, 1) for _ in range(branches)
        )
        self.processes = nn.ModuleList(
            norm_relu_convolution(channels, channels, 3) for _ in range(branches - 1)
        )
        self.compression = norm_relu_convolution(branches * channels, out_channels, 1)
        self.shortcut = norm_relu_convolution(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        size = (features.shape[2], features.shape[3])
        pooled = [F.avg_pool2d(features, k, stride, padding=k // 2) for k, stride in POOLS]
        pooled.append(F.adaptive_avg_pool2d(features, 1))
        maps = [self.branches[0](features)]
        for source, branch, process in zip(pooled, self.branches[1:], self.processes, strict=True):
            maps.append(process(resize(branch(source), size) + maps[-1]))
        return self.compression(torch.cat(maps, dim=1)) + self.shortcut(features)


class Head(nn.Module):
    """(B, C_in, h, w) -> scores (B, K, h, w)."""

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm1 = BatchNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(channels)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        features = self.conv1(F.relu(self.norm1(features)))
        return self.classifier(F.relu(self.norm2(features)))


class Decoder(nn.Module):
    """The low branch's end with its context, beside the high branch's, classified.

    Args:
        num_classes: K.
        channels: c of the encoder.
        context_channels: inside the context module.
        head_channels: of the auxiliary head, half of the other's.
        auxiliary_head: whether there is one.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        context_channels: int,
        head_channels: int,
        auxiliary_head: bool,
    ) -> None:
        super().__init__()
        self.context = Context(8 * channels, context_channels, 2 * channels)
        self.head = Head(4 * channels, 2 * head_channels, num_classes)
        self.auxiliary_head: Head | None = None
        if auxiliary_head:
            self.auxiliary_head = Head(2 * channels, head_channels, num_classes)

    def forward(self, early: Tensor, high: Tensor, low: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The encoder's maps -> scores (B, K, H/8, W/8); in training the auxiliary ones too."""
        context = resize(self.context(low), (high.shape[2], high.shape[3]))
        scores = self.head(torch.cat([high, context], dim=1))
        if self.auxiliary_head is None or not self.training:
            return scores
        return scores, self.auxiliary_head(early)


class Classifier(nn.Module):
    """Both branches' ends at the resolution of the high one, averaged, to the image's class.

    The authors published weights of a network trained on ImageNet, and neither its head nor the
    code; this one is ours.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(10 * channels)
        self.classifier = nn.Linear(10 * channels, num_classes)

    def forward(self, early: Tensor, high: Tensor, low: Tensor) -> Tensor:
        """The encoder's maps -> scores (B, K, 1, 1)."""
        features = torch.cat([high, resize(low, (high.shape[2], high.shape[3]))], dim=1)
        averages = F.relu(self.norm(features)).mean(dim=(2, 3))
        return self.classifier(averages)[:, :, None, None]


class RTFormer(Network):
    """(B, 3, H, W) of any size -> scores (B, K, ceil(H/8), ceil(W/8)).

    In training it gives a pair, the scores and those of an auxiliary head. Under a setting with a
    scale the scores are those of the resized image. Training takes batches of one image: see
    `BatchNorm`. The defaults are Slim as the authors train it on Cityscapes.

    Args:
        num_classes: K.
        base_channels: c of the first stage; 2c and 4c of the next, 8c of the low branch.
        context_channels: inside the context module.
        num_heads: groups of the low branch's attention.
        head_channels: of the auxiliary head; the main one has twice as many.
        cross_size: side of the grid of keys in the cross-resolution attention.
        injection: whether the high branch goes back into the low one, in either block.
        drop_path: rate of all the blocks' residual branches.
        dropout: rate inside the blocks' MLPs.
        attention: of the low branch, those of the paper's ablation: ``gfa`` (GPU-friendly),
            ``external`` (multi-head), ``self`` or ``linformer``.
        external_ratio: of ``external``: external tokens for each channel (0.125, 0.25 and 1 in
            the paper).
        auxiliary_head: whether training scores the high branch's beginning, too.
        head: ``segmentation``, or ``classification`` to pretrain the encoder on whole images: one
            score per class and image, (B, K, 1, 1).
    """

    setting_type = RTFormerReduction
    setting: RTFormerReduction

    def __init__(
        self,
        num_classes: int,
        base_channels: int = 32,
        context_channels: int = 128,
        num_heads: int = 8,
        head_channels: int = 64,
        cross_size: int = 12,
        injection: Sequence[bool] = (True, True),
        drop_path: float = 0.2,
        dropout: float = 0.0,
        attention: Literal["gfa", "external", "self", "linformer"] = "gfa",
        external_ratio: float = 1.0,
        auxiliary_head: bool = True,
        head: Literal["segmentation", "classification"] = "segmentation",
    ) -> None:
        super().__init__(num_classes, 8, published_settings())
        if attention not in LOW_ATTENTION:
            raise UserError(
                f"there is no attention '{attention}': {did_you_mean(attention, LOW_ATTENTION)}"
            )
        if head not in HEADS:
            raise UserError(f"there is no head '{head}': {did_you_mean(head, HEADS)}")
        if len(injection) != 2:
            raise UserError(f"'injection' is 2 values, for either block, not {len(injection)}")
        if not _is_size(cross_size):
            raise UserError(f"'cross_size' is a whole number above 0, not {cross_size!r}")
        if 8 * base_channels % num_heads:
            raise UserError(
                f"num_heads={num_heads} does not divide the low branch's {8 * base_channels} "
                "channels (8 * base_channels)"
            )
        self.base_channels, self.context_channels = base_channels, context_channels
        self.num_heads, self.head_channels = num_heads, head_channels
        self.cross_size, self.injection = cross_size, tuple(injection)

        make_attention = functools.partial(LOW_ATTENTION[attention], num_heads=num_heads)
        if attention == "external":
            make_attention = functools.partial(make_attention, ratio=external_ratio)
        self.encoder = Encoder(base_channels, make_attention, injection, drop_path, dropout)
        self.decoder: Decoder | Classifier
        if head == "segmentation":
            self.decoder = Decoder(
                num_classes, base_channels, context_channels, head_channels, auxiliary_head
            )
        else:
            self.classifies_images = True
            self.decoder = Classifier(num_classes, base_channels)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.setting.scale != 1:
            height, width = (
                max(1, int(side * self.setting.scale + 0.5)) for side in images.shape[2:]
            )
            images = resize(images, (height, width))
        return self.decoder(*self.encoder(images, self.setting.cross_size or self.cross_size))


def initialise(module: nn.Module) -> None:
    """Initial weights of one module, as the authors' code draws them."""
    if isinstance(module, nn.Conv2d):
        fan_in = math.prod(module.kernel_size) * module.in_channels
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, GPUFriendlyAttention | ExternalAttention):
        nn.init.normal_(module.key, std=1e-3)
        nn.init.normal_(module.value, std=1e-3)
    elif isinstance(module, CrossResolutionAttention):
        nn.init.trunc_normal_(module.key_value.weight, std=0.02, a=-0.04, b=0.04)


@register_network
def rtformer_slim(num_classes: int, **arguments: Any) -> RTFormer:
    """5.4 M parameters as trained on Cityscapes.

    The authors' Slim for ADE20K is another network: cross_size=8 and injection=(True, False).
    """
    return RTFormer(num_classes, **arguments)


@register_network
def rtformer_base(num_classes: int, **arguments: Any) -> RTFormer:
    """17.9 M parameters."""
    published: dict[str, Any] = {
        "base_channels": 64,
        "head_channels": 128,
        "injection": (True, False),
    }
    return RTFormer(num_classes, **(published | arguments))

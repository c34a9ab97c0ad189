"""CTS (CVPR 2023): Segmenter, in which superpatches of one class share a token from the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from segtrain.errors import UserError
from segtrain.networks.blocks import Grid, grid_from_tokens, tokens_from_grid
from segtrain.networks.cts_policy import SUPERPATCH, SuperpatchPolicy
from segtrain.networks.plain_vit import Normalisation, Positions
from segtrain.networks.registry import register_network
from segtrain.networks.segmenter import BACKBONES, Segmenter
from segtrain.reduction.plain import Level, run_plainly
from segtrain.reduction.sharing import SIDE, Sharing, TokenSharing, share_tokens

#: First that of ADE20K and Pascal Context; 0.4375 is that of Cityscapes, the others are ours.
#: ADE20K (512x512) so has 103 shared of 256 superpatches, Pascal Context (480x480) 90 of 225,
#: Cityscapes (768x768) 336 of 576.
SAVED = (0.3, 0, 0.15, 0.4375, 0.6, 0.75)


class CTS(Segmenter):
    """(B, 3, H, W) of any size -> scores (B, K, ceil(H/16), ceil(W/16)).

    Images are padded to whole superpatches inside, 2x2 patches of 16 pixels. The policy says which
    ones share a token: its image is the superpatch at half its size, its position the
    mean of the four. The number of tokens is the same for all images. Under ``full`` nobody asks
    the policy, and the network is Segmenter with the same weights.

    The policy is trained by itself, as the network ``cts_policy``, and frozen here: without
    gradients, its batch norms as in evaluation also in training (the authors' go on updating).
    Until its weights are loaded, into ``policy``, it is drawn at random.

    Args:
        num_classes: K.
        backbone, image_size, pretrained, drop_path, positions, normalisation, decoder_heads,
            backbone_arguments: see `Segmenter`. The encoder has patches of 16 pixels and positions
            that are added to tokens.

    Raises:
        UserError: the encoder is another one, or cannot be built.
    """

    setting_type = TokenSharing
    setting: TokenSharing  # type: ignore[assignment]

    def __init__(
        self,
        num_classes: int,
        backbone: str = BACKBONES["s"],
        image_size: Sequence[int] = (512, 512),
        pretrained: bool = False,
        drop_path: float = 0.1,
        positions: Positions = "bilinear",
        normalisation: Normalisation = "half",
        decoder_heads: int | None = None,
        backbone_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            backbone=backbone,
            image_size=image_size,
            pretrained=pretrained,
            drop_path=drop_path,
            positions=positions,
            normalisation=normalisation,
            decoder_heads=decoder_heads,
            backbone_arguments=backbone_arguments,
        )
        if self.encoder.rotary or self.stride * SIDE != SUPERPATCH:
            raise UserError(
                f"CTS shares tokens of {SUPERPATCH // SIDE}x{SUPERPATCH // SIDE} pixels with "
                f"positions added to them, which '{backbone}' has not: take one such as "
                f"{BACKBONES['s']}"
            )
        settings = [TokenSharing.from_values({"saved": saved}) for saved in SAVED]
        self.settings = {setting.name: setting for setting in settings}
        self.setting = settings[0]
        self.policy = SuperpatchPolicy(num_classes=2).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.policy.eval()
        return self

    def fit_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Also Segmenter's, which have no policy: it stays as it is."""
        fitted = super().fit_weights(weights)
        if any(name.startswith("decoder.") for name in fitted):
            fitted = self.policy.state_dict(prefix="policy.") | fitted
        return fitted

    def levels(self, images: Tensor, outputs: Sequence[int]) -> tuple[list[Level], Grid]:
        if not self.setting.saved:
            tokens, grid, rotations = self.encoder.embed(images)
            return run_plainly(self.encoder, tokens, rotations, outputs), grid
        grid = self.encoder.grid_of(images.shape[2:])
        sharing = self._choose(images, grid)
        tokens = self._embed(images, sharing)
        levels = run_plainly(self.encoder, tokens, None, outputs)
        return [Level(level.tokens, sharing.restore) for level in levels], grid

    @torch.no_grad()
    def _choose(self, images: Tensor, grid: Grid) -> Sharing:
        several, one = self.policy(images).float().unbind(dim=1)
        return share_tokens(one - several, self.setting.count(several[0].numel()), grid)

    def _embed(self, images: Tensor, sharing: Sharing) -> Tensor:
        """Images (B, 3, H, W) -> tokens (B, P + N - 3S, C)."""
        encoder, patch = self.encoder, self.encoder.patch_size
        images = encoder.pad(images, SUPERPATCH)
        fine, coarse = (
            tokens_from_grid(F.pixel_unshuffle(scaled, patch))
            for scaled in (images, F.avg_pool2d(images, SIDE))
        )
        pixels = sharing.select(fine, coarse)
        # The selected patches side by side are an image, too.
        strips = F.pixel_shuffle(grid_from_tokens(pixels, (1, pixels.shape[1])), patch)

        grid = encoder.grid_of(images.shape[2:])
        positions = encoder.resize_positions(encoder.vit.pos_embed, grid)
        prefix, fine = positions.tensor_split([positions.shape[1] - grid[0] * grid[1]], dim=1)
        coarse = tokens_from_grid(F.avg_pool2d(grid_from_tokens(fine, grid), SIDE))
        prefix = prefix.expand(len(images), -1, -1)
        positions = torch.cat([prefix, sharing.select(fine, coarse)], dim=1)
        return encoder.embed_patches(strips, positions)


def _variant(size: str, num_classes: int, arguments: dict[str, Any]) -> CTS:
    return CTS(num_classes, **({"backbone": BACKBONES[size]} | arguments))


@register_network
def cts_ti(num_classes: int, **arguments: Any) -> CTS:
    """ViT-Ti."""
    return _variant("ti", num_classes, arguments)


@register_network
def cts_s(num_classes: int, **arguments: Any) -> CTS:
    """ViT-S."""
    return _variant("s", num_classes, arguments)


@register_network
def cts_b(num_classes: int, **arguments: Any) -> CTS:
    """ViT-B."""
    return _variant("b", num_classes, arguments)


@register_network
def cts_l(num_classes: int, **arguments: Any) -> CTS:
    """ViT-L, trained on crops of 640 pixels."""
    return _variant("l", num_classes, {"image_size": (640, 640)} | arguments)

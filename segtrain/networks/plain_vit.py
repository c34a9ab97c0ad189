"""A plain vision transformer of timm, taken apart so that tokens can leave, merge and return."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.errors import UserError, did_you_mean, first_line
from segtrain.inference import IMAGE_MEAN, IMAGE_STD
from segtrain.networks.blocks import Grid, grid_from_tokens, tokens_from_grid
from segtrain.networks.network import Network
from segtrain.networks.open_block import OpenBlock, OpenEvaBlock, open_block
from segtrain.reduction import Setting
from segtrain.reduction.attention_core import AttentionCore
from segtrain.reduction.plain import Level, PlainReduction, run_levels

Positions = Literal["bicubic", "bilinear", "bicubic_antialiased"]
POSITIONS = ("bicubic", "bilinear", "bicubic_antialiased")
Normalisation = Literal["imagenet", "half"]
NORMALISATIONS = ("imagenet", "half")
POSITION_PARAMETER = "encoder.vit.pos_embed"
#: timm's modules whose networks can be taken apart here.
MODULES = ("vision_transformer", "deit", "eva")


class PlainViT(nn.Module):
    """Patch embedding, positions and blocks of a timm VisionTransformer or Eva, by its timm name.

    Prefix tokens (class token, registers) stand before the patches, which follow row by row.

    Args:
        backbone: timm's name, such as ``vit_small_patch16_384``, ``deit_base_patch16_384``,
            ``vit_base_patch14_reg4_dinov2``, ``vit_small_patch16_dinov3`` or
            ``eva02_base_patch14_448``.
        image_size: (height, width) whose positions are parameters; those of other sizes are
            resized from them.
        pretrained: whether timm loads its weights, resized to ``image_size``.
        prefix: whether prefix tokens go through the blocks; if not, they are dropped once positions
            are added.
        final_norm: whether the norm behind the last block is kept.
        ln_eps: of all layer norms; timm's own if None.
        drop_path: rate of the last block; the rates rise linearly from 0.
        drop_path_of_mlps_only: leave the attentions out of it, as OpenMMLab does.
        positions: how positions are resized; timm itself takes ``bicubic_antialiased``, published
            segmentation networks one of the others.
        normalisation: what the blocks are trained on: ``imagenet`` (images as networks here get
            them) or ``half`` ((pixel - 127.5) / 127.5, as augreg's ViTs were trained).
        backbone_arguments: what timm's constructor takes, such as ``embed_dim`` or ``depth``.

    Raises:
        UserError: timm has no such network, or one that is no plain vision transformer, or cannot
            load its weights, or another argument is not of its kind.
    """

    def __init__(
        self,
        backbone: str,
        image_size: Sequence[int] = (512, 512),
        *,
        pretrained: bool = False,
        prefix: bool = True,
        final_norm: bool = True,
        ln_eps: float | None = None,
        drop_path: float = 0.0,
        drop_path_of_mlps_only: bool = False,
        positions: Positions = "bicubic",
        normalisation: Normalisation = "imagenet",
        backbone_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        arguments = dict(backbone_arguments or {})
        for name in arguments:
            if name in OWN_ARGUMENTS:
                raise UserError(
                    f"backbone_arguments: '{name}' is the network's own, or not to be had"
                )
        if normalisation not in NORMALISATIONS:
            raise UserError(
                f"there is no normalisation '{normalisation}': "
                f"{did_you_mean(normalisation, NORMALISATIONS)}"
            )
        self.normalisation: Normalisation = normalisation
        if positions not in POSITIONS:
            raise UserError(
                f"there is no resizing of positions '{positions}': "
                f"{did_you_mean(positions, POSITIONS)}"
            )
        self.positions: Positions = positions
        sides = image_size if isinstance(image_size, Sequence) else ()
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise UserError(f"'image_size' is (height, width), not {image_size!r}")
        self.vit = _create(backbone, pretrained, drop_path_rate=drop_path, **arguments)
        self.vit.head = nn.Identity()
        self.vit.fc_norm = nn.Identity()
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        self.width: int = self.vit.embed_dim
        self.num_heads: int = self.vit.blocks[0].attn.num_heads
        self.num_prefix: int = self.vit.num_prefix_tokens if prefix else 0
        self.depth = len(self.vit.blocks)
        for block in self.vit.blocks:
            if drop_path_of_mlps_only:
                block.drop_path1 = nn.Identity()
            # What takes the place of attention takes that of the fused operator.
            block.attn.fused_attn = True
            if isinstance(block, OpenEvaBlock):
                # Rotations come for all tokens, those of the prefix being none.
                block.attn.num_prefix_tokens = 0
        if not final_norm:
            self.vit.norm = nn.Identity()
        if ln_eps is not None:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = ln_eps
        self.grid: Grid = self.vit.patch_embed.grid_size
        grid = self.grid_of(image_size)
        if self.vit.pos_embed is not None:
            with torch.no_grad():
                self.vit.pos_embed = nn.Parameter(self.resize_positions(self.vit.pos_embed, grid))
        self.grid = grid

    @property
    def rotary(self) -> bool:
        """Whether positions are rotations of queries and keys, which merged tokens have none of."""
        return getattr(self.vit, "rope", None) is not None

    @property
    def reducible(self) -> bool:
        """Whether tokens can merge on the way, without rotations and between halves of blocks."""
        return not self.rotary and all(isinstance(block, OpenBlock) for block in self.vit.blocks)

    def grid_of(self, image_size: Sequence[int]) -> Grid:
        """The patches of an image, the last ones of either axis padded with zeros."""
        height, width = (-(-side // self.patch_size) for side in image_size)
        return height, width

    def resize_positions(self, positions: Tensor, grid: Grid, source: Grid | None = None) -> Tensor:
        """(1, P+N, C) or (1, N, C) of ``source`` (``self.grid`` if None) -> those of a grid."""
        source = source or self.grid
        if source == grid:
            return positions
        prefix = positions.shape[1] - source[0] * source[1]
        resized = F.interpolate(
            grid_from_tokens(positions[:, prefix:], source).float(),
            size=grid,
            mode=self.positions.removesuffix("_antialiased"),
            align_corners=False,
            antialias=self.positions.endswith("antialiased"),
        )
        patches = tokens_from_grid(resized).to(positions)
        return torch.cat([positions[:, :prefix], patches], dim=1)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid, Tensor | None]:
        """Images (B, 3, H, W) -> tokens (B, P+N, C), their grid (h, w), and rotations (P+N, 2d).

        Where the network has no rotations, they are None.
        """
        grid = self.grid_of(images.shape[2:])
        positions = self.vit.pos_embed
        positions = None if positions is None else self.resize_positions(positions, grid)
        tokens = self.embed_patches(self.pad(images, self.patch_size), positions)
        return tokens, grid, self._rotations(grid)

    def pad(self, images: Tensor, multiple: int) -> Tensor:
        """Images (B, 3, H, W), normalised as the blocks expect, zeros up to multiples behind."""
        if self.normalisation == "half":
            images = to_half_range(images)
        height, width = images.shape[2:]
        return F.pad(images, (0, -width % multiple, 0, -height % multiple))

    def embed_patches(self, images: Tensor, positions: Tensor | None) -> Tensor:
        """Images of whole patches, as from `pad`, and their positions -> tokens (B, P+N, C)."""
        vit = self.vit
        tokens = vit.patch_embed.norm(tokens_from_grid(vit.patch_embed.proj(images)))
        count = tokens.shape[1]
        if positions is not None and vit.no_embed_class:
            tokens = tokens + positions
        prefix = [
            token.expand(len(tokens), -1, -1)
            for token in (vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token)
            if token is not None
        ]
        tokens = torch.cat([*prefix, tokens], dim=1)
        if positions is not None and not vit.no_embed_class:
            tokens = tokens + positions
        tokens = vit.norm_pre(vit.pos_drop(tokens))
        return tokens[:, tokens.shape[1] - count - self.num_prefix :]

    def _rotations(self, grid: Grid) -> Tensor | None:
        if not self.rotary:
            return None
        patches = self.vit.rope.get_embed(shape=grid)  # sines beside cosines
        half = patches.shape[1] // 2
        none = patches.new_tensor([0.0] * half + [1.0] * half).expand(self.num_prefix, -1)
        return torch.cat([none, patches])

    def run(
        self,
        blocks: Iterable[int],
        tokens: Tensor,
        rotations: Tensor | None = None,
        core: AttentionCore | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Whole blocks one after the other: (B, T, C) -> (B, T, C).

        Args:
            rotations: (T, 2d), or (B, 1, T, 2d) where images have different tokens.
            core: what takes the place of plain attention.
            between: from the tokens behind a block's attention to those that its MLP gets, where
                the encoder is ``reducible``.
        """
        given: dict[str, Any] = {"rope": rotations, "core": core, "between": between}
        given = {name: value for name, value in given.items() if value is not None}
        for index in blocks:
            tokens = self.vit.blocks[index](tokens, **given)
        return tokens

    def fit_positions(self, positions: Tensor) -> Tensor:
        """A file's positions (1, P+N, C), of a square grid where it is another -> the encoder's."""
        own = self.vit.pos_embed
        if own is None or positions.ndim != 3 or positions.shape[1] == own.shape[1]:
            return positions
        prefix = own.shape[1] - self.grid[0] * self.grid[1]
        side = math.isqrt(positions.shape[1] - prefix)
        if side * side != positions.shape[1] - prefix:
            return positions
        return self.resize_positions(positions, self.grid, (side, side))

    def maps(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The patches among tokens (B, P+N, C) as a map (B, C, h, w)."""
        return grid_from_tokens(tokens[:, self.num_prefix :], grid)


class PlainNetwork(Network):
    """A network over a `PlainViT` whose tokens may be merged on the way.

    A subclass makes ``encoder``, and scores images in `score`. Where a setting leaves images
    different numbers of tokens, they go one at a time in evaluation, so that one's result does not
    depend on the others.
    """

    setting_type: ClassVar[type[Setting]] = PlainReduction
    setting: Any  # of that type
    block_types: ClassVar[tuple[type[nn.Module], ...]] = (OpenBlock, OpenEvaBlock)
    cost_of_window = True
    encoder: PlainViT

    def forward(self, images: Tensor) -> Any:
        if self.data_dependent and not self.training and len(images) > 1:
            return torch.cat([self.score(image[None]) for image in images])
        return self.score(images)

    def score(self, images: Tensor) -> Any:
        """What the network gives, for (B, 3, H, W)."""
        raise NotImplementedError

    def fit_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        positions = weights.get(POSITION_PARAMETER)
        if positions is None:
            return dict(weights)
        return {**weights, POSITION_PARAMETER: self.encoder.fit_positions(positions)}

    def check_setting(self, setting: Setting) -> None:
        if isinstance(setting, PlainReduction):
            setting.check(self.encoder)

    def levels(self, images: Tensor, outputs: Sequence[int]) -> tuple[list[Level], Grid]:
        """The tokens after blocks ``outputs`` (ascending) under the current setting, the grid."""
        return run_levels(self.encoder, images, self.setting, outputs)


#: What `PlainViT` tells timm itself, under its names or timm's.
OWN_ARGUMENTS = {*inspect.signature(PlainViT).parameters, "drop_path_rate"}


def to_half_range(images: Tensor) -> Tensor:
    """Images as networks here get them -> (pixel - 127.5) / 127.5, (B, 3, H, W)."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return (images * std + mean) / 127.5 - 1


@functools.cache
def _names() -> list[str]:
    return [name for module in MODULES for name in timm.list_models(module=module)]


def _create(backbone: str, pretrained: bool, **arguments: Any) -> Any:
    name, _, _ = backbone.partition(".")  # a tag names weights
    if name not in _names():
        near = difflib.get_close_matches(name, _names(), n=3)
        raise UserError(
            f"timm has no plain vision transformer '{backbone}'"
            + (f"; near are: {', '.join(near)}" if near else "")
            + "; timm.list_models('*vit*') names them all"
        )
    try:
        # Rotations are computed for the size that is asked for.
        size = {"dynamic_img_size": True} if timm.models.is_model_in_modules(name, ["eva"]) else {}
        vit: Any = timm.create_model(
            backbone, pretrained=pretrained, num_classes=0, **(size | arguments)
        )
    except (AssertionError, RuntimeError, TypeError, OSError) as error:
        raise UserError(f"timm cannot build '{backbone}': {first_line(error)}") from error
    plain = all(open_block(block) for block in vit.blocks)
    if not plain or getattr(vit, "rope_mixed", False):
        raise UserError(f"'{backbone}' is no plain vision transformer with positions of its own")
    return vit

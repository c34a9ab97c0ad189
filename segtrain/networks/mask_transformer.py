"""Segmenter's decoder (ICCV 2021, 2105.05633, section 3.2): class tokens beside the patches'."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from segtrain.networks.blocks import initialise_linear


class MaskTransformer(nn.Module):
    """Tokens (B, T, C) -> scores (B, T, K), in whatever order the tokens are.

    A token's score of a class is the cosine of the angle between the two behind the blocks, then
    normed over the classes. The defaults are the authors'; OpenMMLab has no dropout,
    ``drop_path=0.1`` and ``drop_path_of_mlps_only``.

    Args:
        width: C.
        num_classes: K.
        layers: how many blocks.
        num_heads: of their attention; C // 64 if None.
        dropout: rate in attention, behind it and in the MLPs.
        drop_path: rate of the last block; the rates rise linearly from 0.
        drop_path_of_mlps_only: leave the attentions out of it.
        eps: of the layer norms.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        layers: int = 2,
        num_heads: int | None = None,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        drop_path_of_mlps_only: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)
        self.class_tokens = nn.Parameter(torch.empty(1, num_classes, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads or max(1, width // 64),
                qkv_bias=True,
                proj_drop=dropout,
                attn_drop=dropout,
                drop_path=drop_path * i / max(1, layers - 1),
                norm_layer=functools.partial(nn.LayerNorm, eps=eps),  # type: ignore[arg-type]
            )
            for i in range(layers)
        )
        for block in self.blocks:
            if drop_path_of_mlps_only:
                block.drop_path1 = nn.Identity()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.patch_projection = nn.Linear(width, width, bias=False)
        self.class_projection = nn.Linear(width, width, bias=False)
        self.score_norm = nn.LayerNorm(num_classes, eps=eps)
        self.apply(initialise_linear)
        nn.init.trunc_normal_(self.class_tokens, std=0.02)
        for projection in (self.patch_projection, self.class_projection):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        num_tokens = tokens.shape[1]
        tokens = self.projection(tokens)
        tokens = torch.cat([tokens, self.class_tokens.expand(len(tokens), -1, -1)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        patches = F.normalize(self.patch_projection(tokens[:, :num_tokens]), dim=2)
        classes = F.normalize(self.class_projection(tokens[:, num_tokens:]), dim=2)
        return self.score_norm(patches @ classes.transpose(1, 2))

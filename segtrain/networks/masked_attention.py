"""Masked attention (Mask2Former, 2112.01527, section 3.2): queries look inside their own masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.networks.blocks import merge_heads, resize, split_heads, tokens_from_grid
from segtrain.networks.mask_prediction import MaskPrediction
from segtrain.networks.pixel_decoder import PixelFeatures, sine_positions


class QueryAttention(nn.Module):
    """Multi-head attention of queries to keys that may be hidden from them.

    Args:
        width: d of all tokens.
        num_heads: they divide d.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # As three of one layer, by whose shape their initial values are drawn.
        packed = nn.init.xavier_uniform_(torch.empty(3 * width, width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        for layer, weight in zip((self.query, self.key, self.value), packed.chunk(3), strict=True):
            layer.weight = nn.Parameter(weight.clone())
            nn.init.zeros_(layer.bias)
        self.projection = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """(B, Q, d), keys and values (B, N, d) -> (B, Q, d).

        Args:
            seen: (B, 1, Q, N) bool, which keys each query sees; None shows all.
        """
        query, key, value = (
            split_heads(layer(tokens), self.num_heads)
            for layer, tokens in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.projection(merge_heads(attended))


class DecoderLayer(nn.Module):
    """Attention to a level, self-attention and an MLP, each with a norm behind its residual.

    Args:
        width: d of queries and tokens.
        num_heads: of either attention.
        mlp_width: between the two linear layers.
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.cross_attention = QueryAttention(width, num_heads)
        self.cross_norm = nn.LayerNorm(width)
        self.self_attention = QueryAttention(width, num_heads)
        self.self_norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, mlp_width)
        self.linear2 = nn.Linear(mlp_width, width)
        self.mlp_norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self, queries: Tensor, positions: Tensor, keys: Tensor, values: Tensor, seen: Tensor
    ) -> Tensor:
        """(B, Q, d), their positions, and tokens (B, N, d) with and without theirs -> (B, Q, d)."""
        attended = self.cross_attention(queries + positions, keys, values, seen)
        queries = self.cross_norm(queries + attended)
        placed = queries + positions
        queries = self.self_norm(queries + self.self_attention(placed, placed, queries))
        return self.mlp_norm(queries + self.linear2(F.relu(self.linear1(queries))))


class MaskedAttentionDecoder(nn.Module):
    """`PixelFeatures` -> what Q queries say before, and behind, each layer.

    Args:
        num_classes: K.
        width: d of queries and features.
        num_queries: Q.
        num_heads: of the attention.
        mlp_width: of the layers.
        num_layers: the i-th looks at level i modulo 3, the coarsest first.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        num_queries: int,
        num_heads: int,
        mlp_width: int,
        num_layers: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(width, num_heads, mlp_width) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.query_features = nn.Embedding(num_queries, width)
        self.query_positions = nn.Embedding(num_queries, width)
        self.level_embedding = nn.Embedding(3, width)
        self.classifier = nn.Linear(width, num_classes + 1)
        self.mask_embedding = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )

    def forward(
        self, features: PixelFeatures, layers_run: int, as_published: bool = False
    ) -> list[MaskPrediction]:
        """What the queries say behind the last layer that runs, in training before each layer, too.

        Args:
            features: of the images.
            layers_run: so many layers run, the first ones.
            as_published: whether masks are made at full size and then resized for the next layer.

        Returns:
            the final prediction first, then those before it, first to last.
        """
        values, keys, small = [], [], []
        for level, embedding in zip(features.levels, self.level_embedding.weight, strict=True):
            grid = level.shape[2], level.shape[3]
            values.append(tokens_from_grid(level) + embedding)
            keys.append(
                values[-1] + sine_positions(grid, level.shape[1], level.device).to(level.dtype)
            )
            if layers_run and not as_published:
                # Products and resizing commute: d small maps are resized once, not Q large ones
                # before every layer.
                small.append(resize(features.pixels.detach(), grid))
        batch = len(features.pixels)
        queries = self.query_features.weight.expand(batch, -1, -1)
        positions = self.query_positions.weight.expand(batch, -1, -1)
        predictions = []
        for index, layer in enumerate(self.layers[:layers_run]):
            turn = index % 3
            normed = self.norm(queries)
            embeddings = self.mask_embedding(normed)
            if self.training:
                predictions.append(self._predict(normed, embeddings, features.pixels))
            if as_published:
                grid = features.levels[turn].shape[2], features.levels[turn].shape[3]
                logits = resize(_masks(embeddings.detach(), features.pixels.detach()), grid)
            else:
                logits = _masks(embeddings.detach(), small[turn])
            queries = layer(queries, positions, keys[turn], values[turn], _seen(logits))
        normed = self.norm(queries)
        final = self._predict(normed, self.mask_embedding(normed), features.pixels)
        return [final, *predictions]

    def _predict(self, normed: Tensor, embeddings: Tensor, pixels: Tensor) -> MaskPrediction:
        return MaskPrediction(self.classifier(normed), _masks(embeddings, pixels))


def _masks(embeddings: Tensor, pixels: Tensor) -> Tensor:
    """(B, Q, d) and (B, d, h, w) -> logits (B, Q, h, w)."""
    return torch.einsum("bqc,bchw->bqhw", embeddings, pixels)


def _seen(logits: Tensor) -> Tensor:
    """Mask logits (B, Q, h, w) -> (B, 1, Q, h*w): inside the mask, or all where that is empty."""
    inside = logits.flatten(2) >= 0
    return (inside | ~inside.any(dim=2, keepdim=True))[:, None]

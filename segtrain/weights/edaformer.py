"""EDAFormer: the names of the authors' code, a fork of MMSegmentation 0.11."""

from segtrain.weights.keys import KeyTable

_BLOCK = {
    "norm1": "norm1",
    "attn.sr": "attention.reduction",
    "attn.proj": "attention.projection",
    "norm2": "norm2",
    "mlp.fc1": "mlp.expand",
    "mlp.dwconv.dwconv": "mlp.depthwise",
    "mlp.fc2": "mlp.contract",
}
# Decoder block -> our level (1/32, 1/16, 1/8) and position in it.
_DECODER_BLOCKS = {
    "attn4": "0.0",
    "attn44": "0.1",
    "attn444": "0.2",
    "attn3": "1.0",
    "attn33": "1.1",
    "attn2": "2.0",
}

OFFICIAL = KeyTable(
    origin="EDAFormer's authors",
    network="edaformer",
    encoder_prefix="backbone.",
    modules={
        f"backbone.{theirs}": f"encoder.stages.{stage - 1}.{ours}"
        for stage in (1, 2, 3, 4)
        for theirs, ours in {
            f"patch_embed{stage}.proj": "embedding.projection",
            f"patch_embed{stage}.norm": "embedding.norm",
            **{f"block{stage}.*.{name}": f"blocks.*.{ours}" for name, ours in _BLOCK.items()},
            f"norm{stage}": "norm",
        }.items()
    }
    | {
        f"decode_head.{block}.{theirs}": f"decoder.levels.{position}.{ours}"
        for block, position in _DECODER_BLOCKS.items()
        for theirs, ours in {**_BLOCK, "attn.norm": "attention.norm"}.items()
    }
    | {
        "decode_head.linear_fuse.conv": "decoder.fuse",
        "decode_head.linear_fuse.bn": "decoder.fuse_norm",
        "decode_head.linear_pred": "decoder.classifier",
    },
    # A classifier that the head's base class builds and the network never calls.
    unused=("decode_head.conv_seg",),
)

"""The policy of CTS: timm's names of EfficientNet-Lite0, for the encoder."""

from __future__ import annotations

from segtrain.weights.keys import KeyTable

_CONVOLUTIONS = ("conv_pw", "conv_dw", "conv_pwl")
_NORMS = ("bn1", "bn2", "bn3")

TIMM = KeyTable(
    origin="timm's EfficientNet-Lite0",
    network="cts_policy",
    modules={"conv_stem": "encoder.conv_stem", "bn1": "encoder.bn1.0"}
    | {f"blocks.*.*.{name}": f"encoder.blocks.*.*.{name}" for name in _CONVOLUTIONS}
    | {f"blocks.*.*.{name}": f"encoder.blocks.*.*.{name}.0" for name in _NORMS},
    # Behind the last map.
    unused=("conv_head", "bn2", "classifier"),
)

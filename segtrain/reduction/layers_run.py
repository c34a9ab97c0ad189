"""Layers left out at inference: of an encoder's stages, and of a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from segtrain.errors import UserError
from segtrain.reduction.setting import Setting


@dataclasses.dataclass(frozen=True)
class LayersRun(Setting):
    """How many of the trained layers run, the first ones of each stage.

    Attributes:
        encoder: of each stage of the encoder, at most those that are trained.
        decoder: of the decoder; at 0 its queries predict as they are.
        gate: whether a trained gate chooses for each image how many layers of the encoder's last
            stage run, in the place of the last number (ECO-M2F).
    """

    encoder: tuple[int, ...]
    decoder: int
    gate: bool = False

    def __post_init__(self) -> None:
        counts = self.encoder
        if not isinstance(counts, tuple) or not all(map(_is_count, counts)):
            shown = list(counts) if isinstance(counts, tuple) else counts
            raise UserError(
                f"'encoder' of a setting counts the layers of each stage, not {shown!r}"
            )
        if not _is_count(self.decoder):
            raise UserError(f"'decoder' of a setting counts layers, not {self.decoder!r}")
        if type(self.gate) is not bool:
            raise UserError(f"'gate' of a setting is true or false, not {self.gate!r}")

    @property
    def data_dependent(self) -> bool:
        return self.gate

    def describe(self) -> str:
        """Such as ``layers_222_decoder_6``."""
        separator = "" if max(self.encoder, default=0) < 10 else "."
        encoder = "gate" if self.gate else f"layers_{separator.join(map(str, self.encoder))}"
        return f"{encoder}_decoder_{self.decoder}"

    def check(self, encoder: Sequence[int], decoder: int, has_gate: bool) -> None:
        """Raise UserError if there are not so many trained layers, or no gate."""
        if len(self.encoder) != len(encoder) or any(
            run > trained for run, trained in zip(self.encoder, encoder, strict=True)
        ):
            raise UserError(
                f"'encoder' of a setting is at most {list(encoder)}, the trained layers of each "
                f"stage, not {list(self.encoder)}"
            )
        if self.decoder > decoder:
            raise UserError(
                f"'decoder' of a setting is at most {decoder}, the trained layers, "
                f"not {self.decoder}"
            )
        if self.gate and not has_gate:
            raise UserError("the setting needs a gate: create the network with 'exits'")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def published_settings(
    encoder: Sequence[int], decoder: int, exits: Sequence[int] | None
) -> list[LayersRun]:
    """``full`` first, then fewer layers of the encoder, then of the decoder, then the gate's.

    Of an encoder in several stages every stage is cut alike; of one in a single stage the last
    layers are left out one by one, down to 2 as in ECO-M2F.
    """
    full = LayersRun("full", tuple(encoder), decoder)
    most = max(encoder)
    settings = [full]
    for count in range(most - 1, 0 if sum(map(bool, encoder)) > 1 else 1, -1):
        cut = tuple(min(count, layers) for layers in encoder)
        settings.append(dataclasses.replace(full, name=_encoder_name(cut), encoder=cut))
    for count in range(decoder - 3, 0, -3):
        settings.append(dataclasses.replace(full, name=f"decoder_{count}", decoder=count))
    if exits is not None:
        settings.append(dataclasses.replace(full, name="gate", gate=True))
    return settings


def _encoder_name(layers: Sequence[int]) -> str:
    return f"layers_{''.join(map(str, layers))}"

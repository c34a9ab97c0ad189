"""The reduction of a network whose encoder has four stages: merged tokens, pooled keys, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from segtrain.errors import UserError, did_you_mean
from segtrain.reduction.merging import TokenMerging
from segtrain.reduction.setting import Setting

_HALF_KEYS = {"kv": {"mode": "bsm", "ratio": 0.6, "stride": [2, 2]}}
_TENTH_OF_KEYS = {"kv": {"mode": "bsm", "ratio": 0.9, "stride": [4, 4]}}
_FIFTH_OF_QUERIES = {"q": {"mode": "bsm", "ratio": 0.8, "stride": [4, 4]}}
_TENTH_OF_QUERIES = {"q": {"mode": "bsm", "ratio": 0.9, "stride": [4, 4]}}
_WINDOWS_OF_QUERIES = {"q": {"mode": "n2d", "stride": [2, 2]}}
#: name -> merging in stages 1 to 4, as SegFormer++ was published.
MERGING: dict[str, list[dict[str, Any]]] = {
    "bsm_hq": [_HALF_KEYS, _HALF_KEYS, _FIFTH_OF_QUERIES, _FIFTH_OF_QUERIES],
    "bsm_fast": [_TENTH_OF_KEYS, _TENTH_OF_KEYS, _TENTH_OF_QUERIES, _TENTH_OF_QUERIES],
    "n2d_2x2": [_WINDOWS_OF_QUERIES] * 4,
}


@dataclasses.dataclass(frozen=True)
class StageMerging:
    """What one stage merges before its attention; None leaves the tokens as they are.

    Attributes:
        q: of the queries, which are unmerged after the attention.
        kv: of the keys and values, after the spatial reduction and the pooling.
    """

    q: TokenMerging | None = None
    kv: TokenMerging | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Build it from ``{"q": {...}, "kv": {...}}``, either of which may be absent or null."""
        if not isinstance(values, Mapping):
            raise UserError(f"a stage of a setting has the keys 'q' and 'kv', got {values!r}")
        for key in values:
            if key not in ("q", "kv"):
                raise UserError(f"a stage has no '{key}': {did_you_mean(str(key), ('q', 'kv'))}")
        chosen = {key: value for key, value in values.items() if value is not None}
        return cls(**{key: TokenMerging.from_values(value) for key, value in chosen.items()})

    @property
    def values(self) -> dict[str, Any]:
        """The plain values that it can be built from."""
        both = {"q": self.q, "kv": self.kv}
        return {key: merging.values for key, merging in both.items() if merging is not None}


@dataclasses.dataclass(frozen=True)
class StagedReduction(Setting):
    """Merged tokens (SegFormer++), pooled keys and values (EDAFormer's ISR), or smaller images.

    Attributes:
        stages: what each of the four stages merges.
        isr: pool sizes of the keys and values of stages 1 to 4, after their spatial reduction and
            its norm (EDAFormer's paper applies its reduction so to other networks, table 5, and
            leaves the place open). Merging sees what is pooled.
        downsample: halve the image first, by nearest neighbours.
    """

    shorthands = ("merge",)

    stages: tuple[StageMerging, ...] = (StageMerging(),) * 4
    isr: tuple[int, ...] = (1, 1, 1, 1)
    downsample: bool = False

    def __post_init__(self) -> None:
        if len(self.stages) != 4:
            raise UserError(f"'stages' of a setting is a list of 4, not of {len(self.stages)}")
        pools = list(self.isr) if isinstance(self.isr, tuple) else self.isr
        whole = isinstance(pools, list) and all(type(pool) is int and pool > 0 for pool in pools)
        if not whole or len(pools) != 4:
            raise UserError(
                f"'isr' of a setting is 4 positive whole numbers, for stages 1 to 4, not {pools!r}"
            )
        if type(self.downsample) is not bool:
            raise UserError(f"'downsample' of a setting is true or false, not {self.downsample!r}")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Build a setting from plain values; what is left out reduces nothing.

        ``{"stages": [{"kv": {"mode": "bsm", "ratio": 0.6, "stride": [2, 2]}}, {}, {}, {}],
        "isr": [2, 1, 1, 1], "downsample": False}``. ``merge`` in the place of ``stages`` names a
        published one, as in ``{"merge": "bsm_hq", "isr": [2, 1, 1, 1]}``.

        Raises:
            UserError: a field is unknown, or holds what the reduction does not take.
        """
        plain = dict(values)
        if "merge" in plain:
            name = plain.pop("merge")
            if "stages" in plain:
                raise UserError("a setting has 'stages' or 'merge', which names published stages")
            if name not in MERGING:
                suggestion = did_you_mean(str(name), MERGING)
                raise UserError(f"no published merging is called '{name}': {suggestion}")
            plain["stages"] = MERGING[name]
        if "stages" in plain:
            if not isinstance(plain["stages"], list | tuple):
                raise UserError(f"'stages' of a setting is a list of 4, not {plain['stages']!r}")
            plain["stages"] = tuple(StageMerging.from_values(stage) for stage in plain["stages"])
        return super().from_values(plain)

    @property
    def values(self) -> dict[str, Any]:
        """The fields without the name, as plain types."""
        return {
            "stages": [stage.values for stage in self.stages],
            "isr": list(self.isr),
            "downsample": self.downsample,
        }

    def describe(self) -> str:
        """Such as ``isr_2211_bsm_hq``, or ``kv12_bsm_2x2_0.6`` for merging that nobody named."""
        parts = []
        if self.isr != (1, 1, 1, 1):
            parts.append("isr_" + ("" if max(self.isr) < 10 else ".").join(map(str, self.isr)))
        merging = [stage.values for stage in self.stages]
        names = [name for name, published in MERGING.items() if published == merging]
        parts += names or self._describe_stages()
        parts += ["downsample"] * self.downsample
        return "_".join(parts) or "full"

    def _describe_stages(self) -> list[str]:
        stages: dict[tuple[str, TokenMerging], str] = {}
        for number, stage in enumerate(self.stages, start=1):
            for tokens, merging in (("kv", stage.kv), ("q", stage.q)):
                if merging is not None:
                    key = tokens, merging
                    stages[key] = stages.get(key, "") + str(number)
        return [
            f"{tokens}{numbers}_{merging.mode}_{'x'.join(map(str, merging.stride))}"
            + ("" if merging.ratio is None else f"_{merging.ratio}")
            for (tokens, merging), numbers in stages.items()
        ]

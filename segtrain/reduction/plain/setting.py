"""The reductions that any plain vision transformer can be run under without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from segtrain.errors import UserError, did_you_mean
from segtrain.reduction.plain.algm import ALGM
from segtrain.reduction.plain.expedit import Expedit
from segtrain.reduction.plain.level import Encoder
from segtrain.reduction.plain.tome import ToMe
from segtrain.reduction.setting import Setting

Kind = ALGM | ToMe | Expedit
KINDS: dict[str, type[Kind]] = {"algm": ALGM, "tome": ToMe, "expedit": Expedit}


@dataclasses.dataclass(frozen=True)
class PlainReduction(Setting):
    """At most one of three reductions; without any, every patch goes through every block.

    Attributes:
        algm: like neighbours, then like tokens anywhere, become one; how many, the image decides.
        tome: in every block a share of the tokens becomes one with its like.
        expedit: the middle blocks run on cluster centres.
    """

    algm: ALGM | None = None
    tome: ToMe | None = None
    expedit: Expedit | None = None

    def __post_init__(self) -> None:
        if len(self.values) > 1:
            raise UserError(f"a setting has one of {', '.join(KINDS)}, not {len(self.values)}")

    @property
    def kind(self) -> Kind | None:
        """The reduction, if there is one."""
        return self.algm or self.tome or self.expedit

    @property
    def data_dependent(self) -> bool:
        return self.algm is not None

    @property
    def threshold_range(self) -> tuple[float, float] | None:
        return None if self.algm is None else (-1.0, 1.0)

    def with_threshold(self, threshold: float) -> Self:
        assert self.algm is not None
        return self._renamed(algm=dataclasses.replace(self.algm, tau=threshold))

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Build a setting from plain values, such as ``{"tome": {"ratio": 0.05}}``.

        A number alone stands for ``tau`` of ``algm``, ``ratio`` of ``tome`` and ``grid`` of
        ``expedit``: ``{"algm": 0.88}``.

        Raises:
            UserError: a field is unknown, or holds what the reduction does not take.
        """
        plain = dict(values)
        for name, kind in KINDS.items():
            if plain.get(name) is not None:
                plain[name] = _build(name, kind, plain[name])
        return super().from_values(plain)

    @property
    def values(self) -> dict[str, Any]:
        """The fields that hold anything, as plain types."""
        chosen: dict[str, Any] = {}
        for name in KINDS:
            kind = getattr(self, name)
            if kind is not None:
                fields = dataclasses.asdict(kind).items()
                chosen[name] = {k: list(v) if isinstance(v, tuple) else v for k, v in fields}
        return chosen

    def describe(self) -> str:
        """Such as ``algm_0.88``, and what differs from the defaults; ``full`` for nothing."""
        for name in KINDS:
            kind = getattr(self, name)
            if kind is not None:
                shown = {kind.main, "removed"}
                others = [
                    f"{field.name}_{getattr(kind, field.name)}"
                    for field in dataclasses.fields(kind)
                    if field.name not in shown and getattr(kind, field.name) != field.default
                ]
                return "_".join([name, kind.describe(), *others])
        return "full"

    def check(self, encoder: Encoder) -> None:
        """Raise UserError if an encoder's tokens cannot be reduced so."""
        if self.kind is None:
            return
        if not encoder.reducible:
            raise UserError(
                f"'{self.name}' does not fit this backbone, whose positions are rotations or whose "
                "blocks do not come apart; its one setting is 'full'"
            )
        self.kind.check(encoder.depth)


def _build(name: str, kind: type[Kind], values: Any) -> Kind:
    """A reduction from a mapping of its fields, or from its main one alone."""
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        values = {kind.main: values}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise UserError(f"'{name}' of a setting has no '{key}': {did_you_mean(key, fields)}")
    if kind.main not in values and fields[kind.main].default is dataclasses.MISSING:
        raise UserError(f"'{name}' of a setting needs '{kind.main}'")
    chosen: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return kind(**chosen)


def published_settings(encoder: Encoder) -> list[PlainReduction]:
    """The settings of the curve; only the first, ``full``, where tokens cannot be reduced.

    The thresholds of ALGM are those that its authors train ViT-S (0.88) and ViT-L (0.95) with.
    """
    full = PlainReduction("full")
    if not encoder.reducible:
        return [full]
    numbers = {"algm": (0.95, 0.88), "tome": (0.02, 0.05, 0.1), "expedit": (0.75, 0.5)}
    return [
        full,
        *(
            PlainReduction.from_values({name: number})
            for name, chosen in numbers.items()
            for number in chosen
        ),
    ]

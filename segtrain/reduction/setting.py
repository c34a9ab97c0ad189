"""The value that a network's reduction is switched by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from segtrain.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Setting:
    """One named, immutable value of a network's reduction.

    A network with a reduction subclasses it with the fields of that reduction; a network without
    one has the single setting ``Setting("full")``.
    """

    #: What else ``from_values`` of a subclass takes, and turns into fields.
    shorthands: ClassVar[tuple[str, ...]] = ()

    name: str

    @property
    def values(self) -> dict[str, Any]:
        """The fields without the name, as plain types (tuples become lists)."""
        fields = dataclasses.asdict(self)
        del fields["name"]
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()
        }

    @property
    def data_dependent(self) -> bool:
        """Whether the cost depends on what the image shows."""
        return False

    @property
    def threshold_range(self) -> tuple[float, float] | None:
        """The ends of the one threshold that trades accuracy for cost; None if there is none.

        Between them the cost never turns from rising to falling or back.
        """
        return None

    def with_threshold(self, threshold: float) -> Self:
        """This setting with another threshold, called by its values."""
        raise NotImplementedError

    def _renamed(self, **fields: Any) -> Self:
        changed = dataclasses.replace(self, name="", **fields)
        return dataclasses.replace(changed, name=changed.describe())

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Build a setting from plain values such as ``{"encoder": [16, 8, 2, 1], ...}``.

        ``name`` may be among them; without it the name tells the values.

        Raises:
            UserError: a field is missing or unknown, or holds what the reduction does not take.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        fields = [name for name in defaults if name != "name"]
        for key in values:
            if key not in defaults:
                suggestion = did_you_mean(key, [*fields, *cls.shorthands])
                raise UserError(f"a setting has no field '{key}': {suggestion}")
        missing = [
            name for name in fields if name not in values and defaults[name] is dataclasses.MISSING
        ]
        if missing:
            raise UserError(f"a setting needs {', '.join(fields)}: {', '.join(missing)} is missing")
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        setting = cls(**{"name": ""} | plain)
        return setting if setting.name else setting._renamed()

    def describe(self) -> str:
        """A name for values that nobody named."""
        return "_".join(f"{key}={value}" for key, value in self.values.items())


def is_share(value: object) -> bool:
    """Whether a plain value is a number from 0 to 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1

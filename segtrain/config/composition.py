"""Values under composition: a tree in which every key is known, with its type by example."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segtrain.config.checks import check_values, conform, is_one_value, takes_text_only
from segtrain.config.files import read_value
from segtrain.errors import UserError, did_you_mean

# Sections handed on as keyword arguments: who receives them checks what is added and has defaults
# for what is removed. Elsewhere every key is needed and no other is read.
OPEN = ("model", "data", "callbacks", "trainer", "optimizer")


class Composition:
    """A tree of values that changes only where a change makes sense.

    Attributes:
        values: the nested values, interpolations unresolved.
        examples: dotted key -> a value of the right type, for every key, sections included.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.examples = flat(_resolved(values))

    def override(self, key: str, value: Any, source: str = "") -> None:
        """Gives a known key another value; a mapping changes the keys that it names.

        Raises:
            UserError: the key is unknown or the value has another type. `source` starts the
                message.
        """
        self._require(key, source)
        example = self.examples[key]
        if isinstance(value, dict) and self._is_section(key):
            for name, item in value.items():
                self.override(f"{key}.{name}", item, source)
        else:
            section, name = self._locate(key)
            section[name] = conform(key, value, example, source)

    def override_text(self, key: str, text: str) -> None:
        """As `override`, with a value as typed on the command line."""
        self._require(key, "")
        quoted = text[:1] in ("'", '"')
        if takes_text_only(key, self.examples[key]) and not quoted:
            value = None if text in ("", "null", "None") else text
        else:
            value = read_value(key, text)
        self.override(key, value)

    def replace(self, key: str, value: Any) -> None:
        """Puts a whole section in the place of another, with its own keys."""
        section, name = self._locate(key)
        section[name] = value
        self.examples = flat(_resolved(self.values))

    def add(self, key: str, value: Any) -> None:
        """Adds a key, and the sections above it, to an open section.

        Raises:
            UserError: the key is there already, or nothing would read it.
        """
        if key in self.examples:
            raise UserError(f"'{key}' exists already: write {key}=value, without '+'")
        if not _is_open(key):
            self._require(key, "", hint=f" ('+' adds only below {', '.join(OPEN)})")
        section = self.values
        *above, name = key.split(".")
        path = ""
        for part in above:
            path = _join(path, part)
            self.examples.setdefault(path, {})
            if not self._is_section(path):
                raise UserError(f"'{key}' cannot be added: '{path}' is a value, not a section")
            section = section.setdefault(part, {})
        section[name] = value
        self.examples |= flat({name: value}, path)

    def remove(self, key: str) -> None:
        """Removes a key from an open section.

        Raises:
            UserError: the key is unknown or needed.
        """
        self._require(key, "")
        if not _is_open(key) or key in ("model.name", "data.name"):
            raise UserError(
                f"'{key}' is needed and cannot be removed: '~' removes only keys below "
                f"{', '.join(OPEN)}"
            )
        section, name = self._locate(key)
        del section[name]
        for known in list(self.examples):
            if known == key or known.startswith(f"{key}."):
                del self.examples[known]

    def resolve(self) -> dict[str, Any]:
        """The final values, interpolations resolved and everything checked.

        Raises:
            UserError: an interpolation leads nowhere, or a value is not a possible one.
        """
        resolved = _resolved(self.values)
        final = flat(resolved)
        for key, value in flat(self.values).items():
            interpolated = isinstance(value, str) and "${" in value
            conform(key, final[key], self.examples[key], f"{value}: " if interpolated else "")
        check_values(final)
        return resolved

    def _require(self, key: str, source: str, hint: str = "") -> None:
        """Raises the error of an unknown key, naming the first part of it that is unknown."""
        if key in self.examples:
            return
        above, part = "", ""
        for part in key.split("."):
            if above and not self._is_section(above):
                raise UserError(f"{source}unknown key '{key}': '{above}' is a value, not a section")
            if _join(above, part) not in self.examples:
                break
            above = _join(above, part)
        elsewhere = [known for known in self.examples if known.endswith(f".{part}")]
        if elsewhere and _join(above, part) == key:
            suggestion = f"did you mean {' or '.join(map(repr, elsewhere))}?"
        else:
            suggestion = did_you_mean(part, self._names_below(above))
        if _is_open(key) and not source:
            hint = f" (+{key}=value adds it)"
        raise UserError(f"{source}unknown key '{key}': {suggestion}{hint}")

    def _is_section(self, key: str) -> bool:
        return isinstance(self.examples[key], dict) and not is_one_value(key)

    def _names_below(self, section: str) -> list[str]:
        if not section:
            return [*self.values, "config", "experiment"]
        return [known.rpartition(".")[2] for known in self.examples if _above(known) == section]

    def _locate(self, key: str) -> tuple[dict[str, Any], str]:
        """The section that holds a key, and the key's last part."""
        section = self.values
        *above, name = key.split(".")
        for part in above:
            section = section[part]
        return section, name


def _is_open(key: str) -> bool:
    return key.startswith(tuple(f"{section}." for section in OPEN))


def _above(key: str) -> str:
    return key.rpartition(".")[0]


def _join(above: str, part: str) -> str:
    return f"{above}.{part}" if above else part


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by dotted key, the sections among them."""
    items = {}
    for name, value in values.items():
        key = _join(above, name)
        items[key] = value
        if isinstance(value, dict) and not is_one_value(key):
            items |= flat(value, key)
    return items


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
        return cast("dict[str, Any]", resolved)
    except OmegaConfBaseException as error:
        message, _, details = str(error).partition("\n")
        key = details.partition("full_key: ")[2].partition("\n")[0]
        raise UserError(f"cannot resolve the value of '{key}': {message}") from error

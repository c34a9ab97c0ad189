"""The grammar of the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from segtrain.errors import UserError, did_you_mean

FLAGS: dict[str, Literal["help", "cfg"]] = {"--help": "help", "-h": "help", "--cfg": "cfg"}
_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")


@dataclass(frozen=True)
class Argument:
    """`key=text` (sign ""), `+key=text` (sign "+") or `~key` (sign "~"), as typed."""

    sign: str
    key: str
    text: str


def parse_arguments(
    arguments: list[str],
) -> tuple[Literal["help", "cfg"] | None, list[Argument]]:
    """The flag that asks to print instead of to run, if any, and the other arguments in order.

    Raises:
        UserError: an argument is none of the forms above.
    """
    show: Literal["help", "cfg"] | None = None
    parsed = []
    for argument in arguments:
        if argument in FLAGS:
            show = FLAGS[argument]
        else:
            parsed.append(_parse(argument))
    return show, parsed


def _parse(argument: str) -> Argument:
    # Agents of sweeps write --key=value.
    body = argument.removeprefix("--")
    sign = body[:1] if body[:1] in ("+", "~") else ""
    key, equals, text = body[len(sign) :].partition("=")
    if not _KEY.fullmatch(key):
        raise UserError(
            f"cannot read the argument '{argument}': write key=value, with a dotted key"
        )
    if sign == "~" and equals:
        raise UserError(f"cannot read the argument '{argument}': write ~{key}, without a value")
    if sign != "~" and not equals:
        if argument.startswith("-"):
            raise UserError(f"unknown flag '{argument}': {did_you_mean(argument, FLAGS)}")
        raise UserError(f"the argument '{argument}' has no value: write {sign}{key}=value")
    return Argument(sign, key, text)

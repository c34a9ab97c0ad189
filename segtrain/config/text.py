"""A configuration as text: YAML, and the help of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from segtrain.config.compose import ComposedConfig
from segtrain.config.composition import flat
from segtrain.config.files import choice_file, list_choices, read_file

_USAGE = """\
Trains a segmentation network, and scores every validation under all its settings.

usage: train.py [group=name ...] [experiment=name] [key=value ...] [--cfg] [--help]

  model=edaformer_tiny         take a file of a group; callbacks=[a,b] merges several
  experiment=name              take a published recipe, before the other arguments
  schedule.steps=2000          override a key (+model.key=2 adds one, ~callbacks.report removes)
  resume=runs/NAME             go on with a stopped run, also resume=FILE.ckpt
                               or resume=wandb:entity/project/RUN_ID[:alias]
  config=runs/NAME/config.yaml repeat a run
  task=validate ckpt=FILE      score a checkpoint under all its settings
  task=gate ckpt=FILE          train the gate of a Mask2Former with exits (docs/mask2former.md)
  --cfg                        print the composed configuration and stop
  --help model=edaformer_tiny  print the file of one choice

examples:
  train.py
  train.py experiment=edaformer_tiny_ade20k data.root=/data/ade20k trainer.devices=4
"""


def to_yaml(values: dict[str, Any]) -> str:
    """The YAML text of composed values; read again, it gives the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(values))


def list_changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What differs between two configurations: `schedule.steps 160000 -> 200000, ...`."""
    old, new = flat(before), flat(after)
    changes = []
    for key in {**old, **new}:
        was, now = old.get(key, _ABSENT), new.get(key, _ABSENT)
        section = key.rpartition(".")[0]
        if section and not (section in old and section in new):
            continue  # listed as a whole
        if was != now and not (isinstance(was, dict) and isinstance(now, dict) and was and now):
            changes.append(f"{key} {_shown(was)} -> {_shown(now)}")
    return ", ".join(changes)


_ABSENT = object()


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(not there)"
    return value if isinstance(value, str) else json.dumps(value)


def help_text(composed: ComposedConfig, folder: Path) -> str:
    """Usage, the groups with their choices, and the composed configuration.

    With choices on the command line (`--help model=edaformer_tiny`): their files.
    """
    if composed.choices:
        return "\n".join(
            f"{group}={name}\n\n{choice_file(folder, group, name).read_text('utf-8')}"
            for group, names in composed.choices.items()
            for name in names
        )
    parts = [_USAGE, "groups and their choices:"]
    for group in [*read_file(folder / "config.yaml")["defaults"], "experiment"]:
        parts.append(f"  {group}")
        for name in list_choices(folder, group):
            parts.append(f"    {name:<28} {_description(choice_file(folder, group, name))}")
    return "\n".join([*parts, "", "the configuration:", "", to_yaml(composed.values)])


def _description(file: Path) -> str:
    first = file.read_text("utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""

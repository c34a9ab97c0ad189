"""From a command line to one checked configuration, before torch is imported.

A run is described by YAML files in groups (`configs/<group>/<name>.yaml`) and by the arguments of
the command line, applied in this order:

1. `configs/config.yaml` and the choices in its `defaults`, or a saved configuration in their place:
   `config=FILE`, the one of a stopped run (`resume=`), or the one of the run that `ckpt=FILE` is a
   checkpoint of;
2. `experiment=NAME`: its choices, then its values;
3. `group=name` (`group=[a,b]` merges several): beats the choice of the experiment, whose
   values still apply;
4. `a.b=value` overrides, `+a.b=value` adds, `~a.b` removes, in the order given.

Interpolations (`${a.b}`) are resolved last, so they follow an override of what they refer to. A
saved configuration holds none: every value in it stands on its own.
"""

from segtrain.config.compose import ComposedConfig, compose, last_value
from segtrain.config.files import read_file
from segtrain.config.text import help_text, list_changes, to_yaml

__all__ = [
    "ComposedConfig",
    "compose",
    "help_text",
    "last_value",
    "list_changes",
    "read_file",
    "to_yaml",
]

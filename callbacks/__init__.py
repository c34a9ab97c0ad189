"""What happens around training: the cost curve, pictures, checkpoints, progress and the report."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from callbacks.checkpoints import Checkpoints
from callbacks.cost_curve import CostCurve
from callbacks.jsonl import ForgetLostSteps
from callbacks.pictures import Pictures
from callbacks.progress import Progress
from callbacks.report import Report
from callbacks.tracking import create_loggers, write_run_record
from segtrain.errors import UserError, check_arguments, did_you_mean

__all__ = [
    "Checkpoints",
    "CostCurve",
    "Pictures",
    "Progress",
    "Report",
    "create_callbacks",
    "create_loggers",
    "write_run_record",
]

#: In the order of their hooks: who writes the rows comes before who reads them, and progress,
#: which leaves the time of a validation out of its speed, comes last.
_CALLBACKS: dict[str, type[Callback]] = {
    "cost_curve": CostCurve,
    "pictures": Pictures,
    "checkpoints": Checkpoints,
    "report": Report,
    "progress": Progress,
}


def create_callbacks(section: Mapping[str, Any], run_folder: Path) -> list[Callback]:
    """Build the callbacks that a configuration names.

    Args:
        section: name -> arguments; None leaves a callback out.
        run_folder: the run's folder.

    Raises:
        UserError: there is no callback of that name, or it takes no such argument.
    """
    for name in section:
        if name not in _CALLBACKS:
            raise UserError(
                f"callbacks: there is no callback '{name}': {did_you_mean(name, _CALLBACKS)}"
            )
    created: list[Callback] = [ForgetLostSteps(run_folder)]
    for name, callback in _CALLBACKS.items():
        if section.get(name) is None:
            continue
        parameters = inspect.signature(callback).parameters
        place = {"run_folder": run_folder} if "run_folder" in parameters else {}
        accepted = [parameter for parameter in parameters if parameter not in place]
        check_arguments(f"callbacks.{name}", section[name], accepted)
        created.append(callback(**place, **section[name]))
    return created

"""What happens around training: curves, pictures, checkpoints, progress and the report."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from callbacks.artifacts import Artifacts
from callbacks.averaging import ExponentialMovingAverage
from callbacks.checkpoints import Checkpoints
from callbacks.cost_curve import CostCurve
from callbacks.jsonl import ForgetLostSteps
from callbacks.panoptic import PanopticCurve
from callbacks.pictures import Pictures
from callbacks.progress import Progress
from callbacks.report import Report
from callbacks.resume import Provenance
from callbacks.signals import StopOnSignal
from callbacks.tracking import check_tracking, create_loggers, write_run_record
from callbacks.trial import Trial
from callbacks.unreadable import Unreadable
from segtrain.errors import UserError, check_arguments, did_you_mean
from tuning.trial import TRIAL

__all__ = [
    "Artifacts",
    "Checkpoints",
    "CostCurve",
    "ExponentialMovingAverage",
    "PanopticCurve",
    "Pictures",
    "Progress",
    "Report",
    "StopOnSignal",
    "Unreadable",
    "check_tracking",
    "create_callbacks",
    "create_loggers",
    "write_run_record",
]

#: In the order of their hooks: the average is there before it is scored or saved, who writes the
#: rows comes before who reads them, and progress, which leaves the time of a validation out of its
#: speed, comes last.
_CALLBACKS: dict[str, type[Callback]] = {
    "ema": ExponentialMovingAverage,
    "cost_curve": CostCurve,
    "panoptic": PanopticCurve,
    "pictures": Pictures,
    "checkpoints": Checkpoints,
    "artifacts": Artifacts,
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
    created: list[Callback] = [ForgetLostSteps(run_folder), Provenance(run_folder), Unreadable()]
    for name, callback in _CALLBACKS.items():
        if section.get(name) is None:
            continue
        parameters = inspect.signature(callback).parameters
        place = {"run_folder": run_folder} if "run_folder" in parameters else {}
        accepted = [parameter for parameter in parameters if parameter not in place]
        check_arguments(f"callbacks.{name}", section[name], accepted)
        created.append(callback(**place, **section[name]))
    # After the checkpoints that it has written.
    created.append(StopOnSignal())
    return [*created, Trial(run_folder)] if TRIAL in os.environ else created

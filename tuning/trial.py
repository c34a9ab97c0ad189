"""How a worker tells the training that it starts which trial it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tuning.study import load_study

if TYPE_CHECKING:
    import optuna

#: Variable of the environment that holds a :class:`TrialAddress` as text.
TRIAL = "SEGTRAIN_TRIAL"
#: What a trial leaves in its run folder.
RESULT = "result.json"
#: Attribute of a trial whose training failed: why.
FAILURE = "failure"


@dataclass(frozen=True)
class TrialAddress:
    """One trial.

    Attributes:
        study: its study's name.
        storage: of the study, as :func:`tuning.storage.open_storage` takes it.
        trial_id: Optuna's id of the trial.
        pruning: of the sweep; None where no values are to be reported.
        lifeline: file descriptor of a pipe that the worker holds open while it lives.
    """

    study: str
    storage: str
    trial_id: int
    pruning: dict[str, int] | None
    lifeline: int | None = None

    def text(self) -> str:
        """For the environment."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> TrialAddress:
        """From the environment."""
        return TrialAddress(**json.loads(text))

    def open_trial(self) -> optuna.Trial:
        """The trial, to report to."""
        import optuna

        study = load_study(self.study, self.storage, self.pruning)
        return optuna.Trial(study, self.trial_id)

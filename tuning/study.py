"""A study that workers share: who runs which trial, and what becomes of a lost worker's trial.

Optuna's storages do three things in one step each, whoever else is at it: they number a new trial,
hand a waiting trial to one worker, and finish a trial once. The rest follows from these, so that no
lock is needed: of trials made at once only the first ``n_trials`` count, and of the retries of one
trial only the first. A trial that came too late is marked ``surplus`` and is never trained.

A worker that runs a trial shows that it lives in the trial's attributes (the journal has no
heartbeat of Optuna's own). Where it no longer does, the trial is failed as ``lost`` and waits again
with the same parameters. A worker that was only asleep finds its trial failed, and stops.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segtrain.errors import UserError
from tuning.storage import open_storage, reported
from tuning.sweep_file import Sweep

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

#: Seconds between two signs of life, and without a new one until a worker counts as lost.
BEAT, PATIENCE = 30, 150
#: A trial whose workers died this often is not tried again: it may be what kills them.
MAX_LOSSES = 3
# Attributes of trials, and of the study.
WORKER, LOST, SURPLUS, RETRY_OF, LOSSES = "worker", "lost", "surplus", "retry_of", "losses"
SPACE = "space"


def open_study(sweep: Sweep, name: str, storage: str) -> optuna.Study:
    """The study of a sweep, begun if it is not there; any number of workers may do so at once.

    Raises:
        UserError: the storage cannot be used, or holds a study of that name over other parameters.
    """
    import optuna

    opened = open_storage(storage)
    with reported(storage):
        study = optuna.create_study(
            storage=opened,
            study_name=name,
            directions=list(sweep.objectives.values()),
            sampler=_sampler(sweep),
            pruner=median_pruner(sweep.pruning),
            load_if_exists=True,
        )
        if SPACE not in study.user_attrs:
            study.set_user_attr(SPACE, sweep.space())
        begun, asked = study.user_attrs[SPACE], sweep.space()
        study.set_metric_names(list(sweep.objectives))
    if begun != asked:
        changed = " and ".join(key for key in asked if asked[key] != begun[key])
        raise UserError(
            f"the study '{name}' was begun with other {changed}: name=NAME begins another one"
        )
    return study


def load_study(name: str, storage: str, pruning: dict[str, int] | None) -> optuna.Study:
    """The study that a worker has opened, as its training sees it."""
    import optuna

    opened = open_storage(storage)
    return optuna.load_study(
        study_name=name,
        storage=opened,
        sampler=optuna.samplers.RandomSampler(),
        pruner=median_pruner(pruning),
    )


def _sampler(sweep: Sweep) -> optuna.samplers.BaseSampler:
    """Seeded by the system: with one seed all workers would begin with the same trials."""
    import optuna

    if sweep.sampler == "random":
        return optuna.samplers.RandomSampler()
    if sweep.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler()
    # Other workers' running trials count as poor ones, or all would try the same place.
    return optuna.samplers.TPESampler(constant_liar=True)


def median_pruner(pruning: dict[str, int] | None) -> optuna.pruners.BasePruner:
    """Stops a trial whose best mIoU so far is below the median of the others at its step."""
    import optuna

    if pruning is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(
        n_startup_trials=pruning["startup_trials"], n_warmup_steps=pruning["warmup_steps"]
    )


def machine() -> str:
    """What two processes share if they see each other's process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return platform.node()


def sign_of_life(beat: int) -> dict[str, Any]:
    """What the worker of a trial writes to its attributes, with a count that goes on."""
    return {"machine": machine(), "pid": os.getpid(), "host": platform.node(), "beat": beat}


class Lives:
    """Which workers live, as one of them sees it.

    A process of this machine is looked up. Any other is alive while its sign of life changes;
    only this machine's clock is used, as others may go wrong.
    """

    def __init__(self) -> None:
        self._here = machine()
        self._seen: dict[int, tuple[Any, float]] = {}

    def is_lost(self, trial: FrozenTrial, now: float) -> bool:
        """Whether nobody runs a running trial of another worker any more.

        Args:
            trial: as it is now.
            now: ``time.monotonic()``.
        """
        worker = trial.user_attrs.get(WORKER)
        if worker is not None and worker["machine"] == self._here and not _runs(worker["pid"]):
            return True
        seen, since = self._seen.get(trial.number, (None, now))
        if trial.number not in self._seen or seen != worker:
            since = now
        self._seen[trial.number] = (worker, since)
        return now - since > PATIENCE


def _runs(pid: int) -> bool:
    """Whether another process of this machine has an id; this one's was another's before."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def counting(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count towards ``n_trials``, each with its newest attempt in its place."""
    retries = {}
    for trial in reversed(trials):
        if RETRY_OF in trial.user_attrs and not trial.user_attrs.get(SURPLUS):
            retries[trial.user_attrs[RETRY_OF]] = trial  # the first of them, as it comes last
    newest = []
    for trial in trials:
        if RETRY_OF in trial.user_attrs or trial.user_attrs.get(SURPLUS):
            continue
        while trial.number in retries:
            trial = retries[trial.number]
        newest.append(trial)
    return newest


def is_due(trials: Sequence[FrozenTrial], number: int, n_trials: int) -> bool:
    """Whether a trial is one of the first ``n_trials``, or the first retry of a lost one."""
    earlier = [t for t in trials if t.number < number and not t.user_attrs.get(SURPLUS)]
    retry_of = next(t for t in trials if t.number == number).user_attrs.get(RETRY_OF)
    if retry_of is None:
        return sum(RETRY_OF not in t.user_attrs for t in earlier) < n_trials
    return all(t.user_attrs.get(RETRY_OF) != retry_of for t in earlier)


def is_open(trial: FrozenTrial) -> bool:
    """Whether the newest attempt at a trial is still to end."""
    return not trial.state.is_finished() or _is_to_be_retried(trial)


def _is_to_be_retried(trial: FrozenTrial) -> bool:
    attributes = trial.user_attrs
    failed = trial.state.name == "FAIL" and attributes.get(LOST, False)
    return bool(failed and attributes.get(LOSSES, 0) < MAX_LOSSES)


def claim(study: optuna.Study, sweep: Sweep, n_trials: int) -> Trial | None:
    """A trial to run with its parameters, a retried one first; None if all are taken."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    waiting = any(trial.state == TrialState.WAITING for trial in trials)
    if not waiting and len(counting(trials)) >= n_trials:
        return None
    trial = study.ask({p.key: p.distribution() for p in sweep.parameters})
    trial.set_user_attr(WORKER, sign_of_life(0))
    if is_due(study.get_trials(deepcopy=False), trial.number, n_trials):
        return trial
    trial.set_user_attr(SURPLUS, True)
    study.tell(trial, state=TrialState.FAIL)
    return None


def give_back(study: optuna.Study, trial: Trial | FrozenTrial, losses: int) -> None:
    """End an attempt at a trial without a result; :func:`retry_lost` lets it wait again.

    Args:
        study: the trial's.
        trial: runs, on this worker or on one that is no more.
        losses: how many of its attempts ended in a worker's or training's sudden death.
    """
    import optuna
    from optuna.trial import TrialState

    attempt = optuna.Trial(study, trial._trial_id)
    try:
        attempt.set_user_attr(LOSSES, losses)
        attempt.set_user_attr(LOST, True)
        study.tell(attempt, state=TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        pass  # another worker was faster


def retry_lost(study: optuna.Study, lives: Lives, n_trials: int) -> None:
    """Let the trials of workers that are no more wait again, each with its parameters.

    A worker calls this while it runs none itself.

    Args:
        study: the study.
        lives: which workers live.
        n_trials: how many trials count.
    """
    import optuna
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.RUNNING and lives.is_lost(trial, time.monotonic()):
            if not is_due(trials, trial.number, n_trials):
                optuna.Trial(study, trial._trial_id).set_user_attr(SURPLUS, True)
            give_back(study, trial, trial.user_attrs.get(LOSSES, 0) + 1)
    for trial in counting(study.get_trials(deepcopy=False)):
        if _is_to_be_retried(trial):
            again = {RETRY_OF: trial.number, LOSSES: trial.user_attrs.get(LOSSES, 0)}
            study.enqueue_trial(trial.params, user_attrs=again)

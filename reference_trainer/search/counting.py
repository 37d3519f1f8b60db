"""Which trials count: a trial that was interrupted and is run again is one trial, not two."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from optuna.exceptions import ExperimentalWarning
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from optuna.study import Study
    from optuna.trial import FrozenTrial

BROKEN = "broken"
"""User attribute of a trial whose run is broken: why, in a sentence."""

MAX_RETRIES = 2
"""How often an interrupted trial is run again; one that dies each time kills its process itself."""

_HISTORY = "retry_history"


def was_interrupted(trial: FrozenTrial) -> bool:
    """Whether the trial ended without a verdict, because its process did."""
    return trial.state is TrialState.FAIL and BROKEN not in trial.user_attrs


def retried(trial: FrozenTrial) -> list[int]:
    """Return the numbers of the interrupted trials that this one repeats."""
    return list(trial.system_attrs.get(_HISTORY, ()))


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those that were asked for: interrupted ones count if given up."""
    return not was_interrupted(trial) or len(retried(trial)) >= MAX_RETRIES


def started(trials: Iterable[FrozenTrial]) -> int:
    """Return how many of the trials that count were started, finished ones included."""
    return sum(counts(trial) and trial.state is not TrialState.WAITING for trial in trials)


def slot_of(trials: Iterable[FrozenTrial], number: int) -> int:
    """Return how many trials that count come before trial ``number``.

    Interrupting a trial shifts the numbers of all later ones, but not their slots.
    """
    return sum(counts(trial) and trial.number < number for trial in trials)


def queue_again(study: Study, trial: FrozenTrial) -> None:
    """Queue an interrupted trial with the same numbers, unless that was done or tried too often."""
    again = any(trial.number in retried(other) for other in study.get_trials(deepcopy=False))
    if not again and was_interrupted(trial) and trial.params:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            policy = RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES)
        policy(study, trial)

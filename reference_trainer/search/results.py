"""What a search found: the trials in order of merit, and settings that repeat one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.trial import TrialState

from reference_trainer.search.counting import BROKEN, was_interrupted
from reference_trainer.search.objective import COUNT_ACCURACY, PRUNED, SETTINGS
from reference_trainer.settings import as_mapping, with_overrides

if TYPE_CHECKING:
    from collections.abc import Iterable

    from optuna.trial import FrozenTrial

    from reference_trainer.config import Config


def best_first(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that ran to their end, the smallest error first."""
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (trial.value, trial.number))


def verdict(trial: FrozenTrial) -> str:
    """Return in a few words what became of a trial."""
    if BROKEN in trial.user_attrs:
        return f"broken: {trial.user_attrs[BROKEN]}"
    if trial.state is TrialState.COMPLETE:
        accuracy = trial.user_attrs[COUNT_ACCURACY]
        return f"held-out NMSE {trial.value:.4g}, source count right {accuracy:.1%}"
    if trial.state is TrialState.PRUNED:
        return f"pruned {trial.user_attrs[PRUNED]}"
    return "interrupted" if was_interrupted(trial) else trial.state.name.lower()


def settings_of(trial: FrozenTrial, chosen: Config) -> Config:
    """Return the whole run of a trial, ``chosen`` being what all trials have in common."""
    return with_overrides(chosen, trial.user_attrs[SETTINGS])


def assignments_between(start: Config, end: Config) -> tuple[str, ...]:
    """Return the ``key=value`` settings that make ``end`` of ``start``; exactly, to the last bit."""
    before = as_mapping(start)
    return tuple(
        f"{section}.{key}={value}"
        for section, values in as_mapping(end).items()
        for key, value in values.items()
        if value != before[section][key]
    )

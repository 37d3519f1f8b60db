"""The search: one trial after the other, until the study has all of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from reference_trainer.search.counting import counts, queue_again
from reference_trainer.search.errors import AllTrialsStartedError, BrokenTrialError
from reference_trainer.search.objective import TrialObjective
from reference_trainer.search.study import opened_study
from reference_trainer.search.view import SilentSearchView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from reference_trainer.search.study import SearchPlan, SharedStudy
    from reference_trainer.search.view import SearchView

    Told = Callable[[Study, FrozenTrial], None]


def search(plan: SearchPlan, *, view: SearchView | None = None) -> tuple[FrozenTrial, ...]:
    """Run trials until the study has ``plan.n_trials``; return all that count, in order.

    Other processes may work on the same study: each trial is run by one of them. Trials of processes
    that died are run again with the same numbers. Trials that others still run are returned as they
    are.

    Raises:
        SearchError: directory or storage cannot be used, or the study searches something else.
        TrainerError: what a person can mend in a run; its trial is queued again.
    """
    view = view or SilentSearchView()
    with opened_study(plan) as study:
        objective = TrialObjective(plan, view=view)

        def told(_: Study, trial: FrozenTrial) -> None:
            trials = study.get_trials(deepcopy=False)
            view.trial_ended(trial, sum(counts(t) and t.state.is_finished() for t in trials))

        with _handing_back(study, objective):
            while _goes_on(study, objective, told):
                pass
        return tuple(trial for trial in study.get_trials() if counts(trial))


def _goes_on(study: SharedStudy, objective: TrialObjective, told: Told) -> bool:
    """Run trials; return whether there may be more: after one that another process took over."""
    try:
        study.optimize(objective, catch=(BrokenTrialError,), callbacks=[told], gc_after_trial=True)
    except AllTrialsStartedError:
        return False
    except (UpdateFinishedTrialError, ValueError):  # of Optuna, on closing a trial that is closed
        if not objective.lost:
            raise
    return True


@contextmanager
def _handing_back(study: SharedStudy, objective: TrialObjective) -> Iterator[None]:
    """Queue the trial again that was running when the block was interrupted or failed."""
    try:
        yield
    finally:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
            if trial.number == objective.number:
                queue_again(study, trial)

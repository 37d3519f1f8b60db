"""One trial: a whole run under the guard, and the one number it is judged by.

That number is the held-out error of the covariance: no loss weight is in it, so that a trial cannot win
by weighing its terms less. Scenes, their order and the initial weights are the same in every trial.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import UpdateFinishedTrialError

import gradguard as gg
from reference_trainer.reporting import SilentView
from reference_trainer.search.counting import BROKEN
from reference_trainer.search.errors import BrokenTrialError
from reference_trainer.settings import with_overrides
from reference_trainer.train import train

if TYPE_CHECKING:
    from pathlib import Path

    from optuna.trial import Trial

    from reference_trainer.evaluation import Evaluation
    from reference_trainer.results import EpochResult
    from reference_trainer.search.study import SearchPlan
    from reference_trainer.search.view import SearchView

SETTINGS = "settings"
"""User attribute of a trial: what it ran with, as a list of ``key=value``."""

COUNT_ACCURACY = "source count accuracy"
"""User attribute: share of the held-out scenes whose number of sources is right; not optimised."""

UNTRAINED = "untrained"
"""User attribute: the measure before the first step, the same in every trial."""

DIAGNOSIS = "diagnosis"
"""User attribute: everything the guard says about the run."""

PRUNED = "pruned"
"""User attribute of a trial that was stopped early: when, and how good it was."""


def measure(evaluation: Evaluation) -> float:
    """Return what is minimised: no loss weight changes it."""
    return evaluation.covariance_nmse


class TrialView(SilentView):
    """Reports every epoch, and ends the run when the trial is broken or not worth going on."""

    def __init__(self, trial: Trial, view: SearchView) -> None:
        self.value = math.nan
        self._trial, self._view = trial, view

    def epoch_ended(self, result: EpochResult) -> None:
        """Report the measure of this epoch.

        Raises:
            BrokenTrialError: loss or measure are not finite, or the run ended without a step.
            optuna.TrialPruned: the pruner says so; never after the last epoch.
        """
        self._view.epoch_ended(self._trial.number, result)
        require_sound(result)
        if result.held_out is None:
            return
        self.value = measure(result.held_out)
        if result.epoch == 0:  # not a report: the pruner would take it for the best of a bad trial
            self._trial.set_user_attr(UNTRAINED, self.value)
            return
        self._trial.report(self.value, result.epoch)
        self._trial.set_user_attr(COUNT_ACCURACY, result.held_out.source_count_accuracy)
        if result.epoch < result.epochs and self._trial.should_prune():
            when = f"after epoch {result.epoch} of {result.epochs} at {self.value:.4g}"
            self._trial.set_user_attr(PRUNED, when)
            raise optuna.TrialPruned(when)


def require_sound(result: EpochResult) -> None:
    """Check the numbers of an epoch; after the last one, that a step was taken at all.

    Raises:
        BrokenTrialError: a number is NaN or infinite, or every step was skipped or vetoed.
    """
    if result.epoch == result.epochs and not result.steps_taken:
        raise BrokenTrialError(f"no optimizer step was taken in {result.epochs} epochs")
    numbers = {"training loss": result.training_loss}
    if result.held_out is not None:
        numbers["held-out loss"] = result.held_out.loss
        numbers["held-out covariance NMSE"] = measure(result.held_out)
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise BrokenTrialError(f"the {name} is {number} after epoch {result.epoch}")


class TrialObjective:
    """Runs a trial and returns its measure; what Optuna calls.

    Args:
        plan: the search.
        view: is told what happens.
    """

    def __init__(self, plan: SearchPlan, *, view: SearchView) -> None:
        self.number: int | None = None
        self.lost = False
        self._plan, self._view = plan, view

    def __call__(self, trial: Trial) -> float:
        """Run the trial.

        Raises:
            BrokenTrialError: the guard found an error, vetoed too many steps, or a number is not finite.
            optuna.TrialPruned: the pruner ended the run.
        """
        self.number, self.lost = trial.number, False
        assignments = [dimension.suggest(trial) for dimension in self._plan.space]
        trial.set_user_attr(SETTINGS, assignments)
        self._view.trial_started(trial.number, assignments)
        try:
            return self._run(trial, assignments)
        except UpdateFinishedTrialError:  # silent for so long that another process took it over
            self.lost = True
            raise

    def _run(self, trial: Trial, assignments: list[str]) -> float:
        config = with_overrides(self._plan.base, assignments)
        directory = self._plan.directory / "trials" / f"{trial.number:04d}"
        view = TrialView(trial, self._view)
        stopped: Exception | None = None
        try:
            train(config, run_directory=directory, view=view)
        except (BrokenTrialError, gg.GateCeilingError, optuna.TrialPruned) as error:
            stopped = error
        finally:
            _drop_weights(directory)
        diagnosis = gg.diagnose(gg.read_run(directory).log)
        trial.set_user_attr(DIAGNOSIS, str(diagnosis))
        reason = _why_broken(stopped, diagnosis)
        if reason is not None:
            trial.set_user_attr(BROKEN, reason)
            raise BrokenTrialError(reason) from stopped
        if stopped is not None:
            raise stopped
        return view.value


def _why_broken(stopped: Exception | None, diagnosis: gg.Diagnosis) -> str | None:
    """Return in one sentence or more why the numbers of a run mean nothing; None if they do."""
    reasons = [
        f"{cause.finding.code}: {cause.finding.message}"
        for cause in diagnosis.causes
        if cause.finding.severity is gg.Severity.ERROR
    ]
    if isinstance(stopped, (BrokenTrialError, gg.GateCeilingError)):
        reasons.insert(0, str(stopped))
    return "; ".join(reasons) or None


def _drop_weights(directory: Path) -> None:
    """Delete checkpoints: 65 MB a trial, and the best trial's settings give the same weights again."""
    for path in directory.glob("*.pt"):
        path.unlink()

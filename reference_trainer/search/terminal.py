"""A search in the terminal: a line for every trial, a progress bar, and the best settings to paste."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self

from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from reference_trainer.search.counting import BROKEN
from reference_trainer.search.objective import COUNT_ACCURACY, SETTINGS, measure
from reference_trainer.search.results import best_first, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from optuna.trial import FrozenTrial

    from reference_trainer.results import EpochResult
    from reference_trainer.search.study import SearchPlan

_SHOWN = 5


class SearchTerminal:
    """Shows a search on a console; a context manager.

    Args:
        plan: the search.
        console: where to draw; standard output when None.
    """

    def __init__(self, plan: SearchPlan, *, console: Console | None = None) -> None:
        self.console = console or Console(force_interactive=None if sys.stdout.isatty() else False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            auto_refresh=False,  # a thread would compete with the training step
            disable=not (self.console.is_terminal and self.console.is_interactive),
        )
        self._trials = self._progress.add_task("trials", total=plan.n_trials)
        self._epochs = self._progress.add_task("epochs", total=plan.base.optimization.epochs)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def trial_started(self, number: int, assignments: Sequence[str]) -> None:
        """Print what the trial runs with."""
        short = ", ".join(one.partition(".")[2] for one in assignments)
        self._print(f"trial {number}: {short}")
        self._progress.reset(self._epochs, description=f"epochs of trial {number}")

    def epoch_ended(self, number: int, result: EpochResult) -> None:
        """Move the bar, and say beside it how good the trial is."""
        seen = "" if result.held_out is None else f" NMSE {measure(result.held_out):.3f}"
        words = f"epochs of trial {number}{seen}"
        self._progress.update(self._epochs, completed=result.epoch, description=words, refresh=True)

    def trial_ended(self, trial: FrozenTrial, ended: int) -> None:
        """Print the verdict."""
        self._progress.update(self._trials, completed=ended)
        broken = BROKEN in trial.user_attrs
        self._print(f"trial {trial.number}: {verdict(trial)}", style="red" if broken else "bold")

    def finished(self, trials: Sequence[FrozenTrial], *, paste: Sequence[str]) -> None:
        """Print the best trials, and the command that repeats the best.

        Args:
            trials: all trials of the study that count.
            paste: the lines of the command; empty when no trial ran to its end.
        """
        self.console.print(summary(trials))
        best = best_first(trials)[:_SHOWN]
        if best:
            self.console.print(best_table(best))
        for line in paste:
            self._print(line)

    def _print(self, line: str, *, style: str | None = None) -> None:
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def summary(trials: Sequence[FrozenTrial]) -> str:
    """Return in one line how many trials ended how."""
    broken = sum(BROKEN in trial.user_attrs for trial in trials)
    numbers = {
        "complete": _number(trials, TrialState.COMPLETE),
        "pruned": _number(trials, TrialState.PRUNED),
        "broken": broken,
        "given up": _number(trials, TrialState.FAIL) - broken,
        "running elsewhere": _number(trials, TrialState.RUNNING),
        "waiting": _number(trials, TrialState.WAITING),
    }
    told = ", ".join(f"{number} {name}" for name, number in numbers.items() if number)
    return f"{len(trials)} trials: {told or 'none'}"


def best_table(trials: Sequence[FrozenTrial]) -> Table:
    """Return the trials as a table, one column each."""
    table = Table("setting", *(f"trial {trial.number}" for trial in trials))
    table.add_row("held-out NMSE", *(f"{trial.value:.4f}" for trial in trials))
    accuracies = (trial.user_attrs[COUNT_ACCURACY] for trial in trials)
    table.add_row("source count right", *(f"{share:.1%}" for share in accuracies), end_section=True)
    pairs = [[one.split("=") for one in trial.user_attrs[SETTINGS]] for trial in trials]
    for row in zip(*pairs, strict=True):
        table.add_row(row[0][0], *(value for _, value in row))
    return table


def _number(trials: Sequence[FrozenTrial], state: TrialState) -> int:
    return sum(trial.state is state for trial in trials)

"""A run in the terminal: a line for every step and epoch, a progress bar, a closing summary."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import gradguard as gg
from gradguard.views.terminal import REFRESH_S, LiveView, summary_table

if TYPE_CHECKING:
    from types import TracebackType

    from gradguard import StepRecord
    from reference_trainer.config import Config
    from reference_trainer.evaluation import Evaluation
    from reference_trainer.results import EpochResult, RunStart, TrainingResult


class TerminalView:
    """Shows a run on a console; a context manager.

    On a terminal the lines scroll by above a progress bar and the newest readings; elsewhere there
    are the lines alone, without control codes.

    Args:
        console: where to draw; standard output when None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(force_interactive=None if sys.stdout.isatty() else False)
        self._steps = LiveView(console=self.console)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("optimizer steps", total=None)
        self._live: Live | None = None
        self._drawn_at_s = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal and self.console.is_interactive:
            # No refresh thread: it would compete with the training step for the interpreter.
            shown = Group(self._progress, self._steps)
            self._live = Live(shown, console=self.console, auto_refresh=False)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
            self._live = None

    def preparing(self, config: Config) -> None:
        """Say what takes the first seconds."""
        doing = {
            "memory": f"drawing {config.scenes.train + config.scenes.validation} scenes",
            "fly": f"drawing {config.scenes.validation} scenes",
            "disk": f"checking the scenes in {config.scenes.directory}",
        }
        told = doing[config.scenes.source]
        self._print(f"{told}, rehearsing one forward and backward pass ...")

    def started(self, start: RunStart) -> None:
        """Print what will run, and whether every parameter is reached."""
        self._print(f"{start.tensors} tensors, {start.parameters:,} parameters, {start.live} live")
        for name in start.dead:
            self._print(f"  no live gradient: {name}")
        self._print(f"{_scenes(start)}, {start.held_out_scenes} held out, {_PROOF[start.source]}")
        together = f", {start.processes} processes" if start.processes > 1 else ""
        self._print(f"{start.precision} on {start.device}, {_threads(start)}{together}")
        if start.directory is not None:
            self._print(f"recorded in {start.directory}")
        if start.steps_taken:
            self._print(f"going on after {start.steps_taken} optimizer steps")
        self._progress.update(self._task, total=start.planned_steps, completed=start.steps_taken)

    def step_ended(self, record: StepRecord) -> None:
        """Print one outcome line."""
        self._steps(record)
        self._progress.advance(self._task)
        if self._live is not None and time.monotonic() - self._drawn_at_s >= REFRESH_S:
            self._live.refresh()
            self._drawn_at_s = time.monotonic()

    def epoch_ended(self, result: EpochResult) -> None:
        """Print how good the weights are on both sets."""
        parts = [f"epoch {result.epoch:>3} of {result.epochs}"]
        if result.training_loss is not None:
            parts.append(f"training loss {result.training_loss:.4f}")
        for name, seen in (("memorised", result.memorised), ("held out", result.held_out)):
            if seen is not None:
                parts.append(f"{name} {seen.loss:.4f} (NMSE {seen.covariance_nmse:.3f})")
        self._print("  ".join(parts), style="bold")
        for finding in result.findings:
            self._print(f"{finding.code} {finding.severity}: {finding.message}", style="red")

    def finished(self, result: TrainingResult) -> None:
        """Print the closing summary and the diagnosis."""
        self.console.print(summary_table(result.log), quality_table(result))
        self._print(f"{result.wall_s:.0f} s in all, setting up and evaluations included")
        for line in str(gg.diagnose(result.log)).splitlines():
            self._print(line)

    def _print(self, line: str, *, style: str | None = None) -> None:
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def quality_table(result: TrainingResult) -> Table:
    """Return both sets before and after training, on one scale; the averaged weights, evaluated."""
    (first, memorised), (first_held_out, held_out) = result.memorised, result.held_out
    table = Table("evaluated", "memorised", "held out", "memorised, live weights")
    columns = (memorised, held_out, result.live)
    table.add_row("loss before", _number(first.loss), _number(first_held_out.loss), "")
    table.add_row("loss", *(_number(seen.loss) for seen in columns))
    falls = (_fall(first, memorised), _fall(first_held_out, held_out), _fall(first, result.live))
    table.add_row("fall", *falls)
    table.add_row("covariance NMSE", *(_number(seen.covariance_nmse) for seen in columns))
    inside = (1.0 - seen.terms["alignment"] for seen in columns)
    table.add_row("power in true subspace", *(f"{share:.1%}" for share in inside))
    table.add_row("source count right", *(f"{s.source_count_accuracy:.1%}" for s in columns))
    return table


def _number(value: float) -> str:
    return f"{value:.4f}"


def _fall(first: Evaluation, last: Evaluation) -> str:
    return f"{1.0 - last.loss / first.loss:.1%}"


_PROOF = {
    "memory": "none in both (fingerprints compared)",
    "disk": "none in both (fingerprints compared)",
    "fly": "none in both (streams of their own)",
}


def _scenes(start: RunStart) -> str:
    if start.source == "fly":
        return f"{start.memorised_scenes} fresh scenes in every epoch"
    return f"{start.memorised_scenes} scenes to memorise"


def _threads(start: RunStart) -> str:
    number = f"{start.threads} thread{'s' if start.threads > 1 else ''}"
    timed = ", ".join(f"{n}: {s:.2f} s" for n, s in start.thread_seconds.items())
    return f"{number} (a pass takes {timed})" if timed else number

"""A run in the terminal: a line for every optimizer step, a live panel, a closing summary."""

from __future__ import annotations

import sys
import time
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gradguard.records import StepOutcome, StepRecord
from gradguard.views import wording
from gradguard.views.tally import Tally, ViewState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gradguard.runlog import RunLog

REFRESH_S = 0.25
"""Shortest time between two drawings on a terminal: drawing costs milliseconds, a line none."""

UNNAMED = "optimizer"
"""What :func:`gradguard.watch` calls an optimizer that was given without a name."""

_STYLES: Mapping[StepOutcome, str] = MappingProxyType(
    {
        StepOutcome.APPLIED: "green",
        StepOutcome.SKIPPED_BY_SCALER: "yellow",
        StepOutcome.VETOED: "magenta",
        StepOutcome.NO_GRADIENT: "yellow",
        StepOutcome.NO_MOTION: "yellow",
        StepOutcome.CORRUPTED: "bold red",
    }
)
_OUTCOME_WIDTH = max(len(outcome) for outcome in StepOutcome)
_READING_WIDTH, _COUNT_WIDTH = _OUTCOME_WIDTH, 6
"""Least widths of the panel's columns, so that it keeps its size while values change."""


class Watched(Protocol):
    """What a view needs of a Guard."""

    def subscribe(self, listener: Callable[[StepRecord], None], /) -> object:
        """Call the listener with every record from now on."""

    def flush(self) -> object:
        """Hand over the records that are still on their way."""


class LiveView:
    """Shows a run while it goes on; a listener for records and a context manager.

    Every attempted step becomes one line. On a terminal the lines scroll by above a panel with the
    newest readings, drawn a few times a second; elsewhere (a file, a pipe) there are the lines, at
    once, and no control codes.

    Args:
        guard: the guard to listen to from the start of the block; at its end the guard is flushed
            and then no longer listened to. Without one, call the view with every record.
        console: where to draw; standard output when None.
        total_steps: number of steps expected, of all optimizers together, for the remaining time.
        every: print only every so many applied steps; other outcomes are always printed.

    Raises:
        ValueError: for an ``every`` or ``total_steps`` below 1.
    """

    def __init__(
        self,
        guard: Watched | None = None,
        *,
        console: Console | None = None,
        total_steps: int | None = None,
        every: int = 1,
    ) -> None:
        for name, value in (("every", every), ("total_steps", total_steps)):
            if value is not None and value < 1:
                raise ValueError(f"LiveView got {name}={value}; pass a whole number from 1")
        self.console = _standard_output() if console is None else console
        self._guard = guard
        self._every = every
        self._state = ViewState(total_steps=total_steps)
        self._listening = True
        self._live: Live | None = None
        self._waiting: list[Text] = []
        self._drawn_at_s = 0.0

    @property
    def state(self) -> ViewState:
        """What the panel shows."""
        return self._state

    def __call__(self, record: StepRecord) -> None:
        """Take in one record."""
        if not self._listening:
            return
        self._state = self._state.after(record)
        if record.outcome is not StepOutcome.APPLIED or record.step % self._every == 0:
            self._show(outcome_line(record))
        if self._live is not None and time.monotonic() - self._drawn_at_s >= REFRESH_S:
            self._draw(self._live)

    def __enter__(self) -> Self:
        if self._guard is not None:
            self._guard.subscribe(self)
        if self.console.is_terminal and self.console.is_interactive:
            # No refresh thread: it would compete with the training step for the interpreter.
            self._live = Live(self, console=self.console, auto_refresh=False)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._guard is not None:
                self._guard.flush()
                self._listening = False
        finally:
            self._end_panel()

    def __rich__(self) -> Panel:
        """Return the panel, also for use inside another live display."""
        table, progress = status_table(self._state), _progress(self._state)
        return Panel(table, title="gradguard", subtitle=progress, expand=False)

    def _show(self, line: Text) -> None:
        line = _encodable(line, self.console.encoding)
        if self._live is None:
            self.console.print(line, highlight=False, soft_wrap=True)
        else:
            self._waiting.append(line)

    def _draw(self, live: Live) -> None:
        """Print the lines that wait, all at once: the panel is drawn anew below each printing."""
        if self._waiting:
            lines = Text("\n").join(self._waiting)
            self.console.print(lines, highlight=False, no_wrap=True, overflow="ellipsis")
            self._waiting.clear()
        else:
            live.refresh()
        self._drawn_at_s = time.monotonic()

    def _end_panel(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            try:
                self._draw(live)
            finally:
                live.stop()


def outcome_line(record: StepRecord) -> Text:
    """Return one attempted step as one line of text; a name that the user gave is part of it."""
    ratio = None if record.drift is None else record.drift.update_to_weight
    line = Text(f"step {record.step:>6}  ")
    if record.optimizer != UNNAMED:
        line.append(f"{wording.one_line(record.optimizer):<12}  ", style="cyan")
    line.append(f"{record.outcome:<{_OUTCOME_WIDTH}}  ", style=_STYLES[record.outcome])
    readings = (
        f"loss {wording.number(record.loss):<10}",
        f"scale {wording.loss_scale(record.loss_scale_before):<6}",
        f"gradient norm {wording.number(record.gradient_norm):<10}",
        f"update/weight {wording.number(ratio):<10}",
        f"lr {_rates(record)}",
    )
    line.append("  ".join(readings))
    note = _note(record)
    if note:
        line.append(f"  {note}", style=_STYLES[record.outcome])
    return line


def status_table(state: ViewState) -> Table:
    """Return the newest readings and the counts of all outcomes, one column per optimizer."""
    table = Table.grid(padding=(0, 2))
    if not state.tallies:
        table.add_row("waiting for the first optimizer step")
        return table
    for width in (_READING_WIDTH, _COUNT_WIDTH):
        table.add_column()
        for _ in state.tallies:
            table.add_column(min_width=width)
    if len(state.tallies) > 1:
        names = [Text(wording.one_line(name), style="cyan") for name in state.tallies]
        table.add_row("", *names, "", *names)
    tallies = state.tallies.values()
    left = _rows([_newest(tally) for tally in tallies])
    right = _rows([_totals(tally) for tally in tallies])
    for newest, totals in zip(left, right, strict=True):
        table.add_row(*newest, *totals)
    return table


def summary_table(log: RunLog) -> Table:
    """Return what became of a run: outcomes, loss, update norms, time, the guard's own cost.

    The loss is the optimised one, of the first and the last step that has one; the update norms are
    those of applied steps. Findings stand below.
    """
    caption = "\n".join(
        f"{finding.code} {finding.severity}: {wording.one_line(finding.message)}"
        for finding in log.findings
    )
    table = Table(
        title="Summary of the run",
        show_header=len(log.optimizers) > 1,
        caption=Text(caption) if caption else None,
        caption_justify="left",
    )
    table.add_column("optimizer")
    columns = [_summary(log.for_optimizer(name)) for name in log.optimizers]
    for name in log.optimizers:
        table.add_column(Text(wording.one_line(name)))
    for label in columns[0] if columns else ():
        table.add_row(label, *(column[label] for column in columns))
    if not columns:
        table.add_row("no optimizer step was recorded")
    return table


def _rates(record: StepRecord) -> str:
    return " ".join(wording.number(rate) for rate in record.learning_rates) or wording.NOT_MEASURED


def _note(record: StepRecord) -> str:
    """Say what is known about an attempt that was not applied."""
    parts = [] if record.reason is None else [wording.one_line(record.reason)]
    counts = ((record.nan_count, "NaN"), (record.inf_count, "Inf"))
    parts += [f"{count} {name}" for count, name in counts if count]
    if record.first_nonfinite is not None:
        parts.append(f"first in {wording.one_line(record.first_nonfinite)}")
    return ", ".join(parts)


def _progress(state: ViewState) -> str | None:
    if state.total_steps is None:
        return None
    done = f"{state.attempts} of {state.total_steps} steps"
    remaining_s = state.remaining_s
    return done if remaining_s is None else f"{done}, {wording.duration(remaining_s)} left"


def _rows(columns: list[Mapping[str, str | Text]]) -> list[list[str | Text]]:
    """Return label and values of every row of equally labelled columns."""
    return [[label, *(column[label] for column in columns)] for label in columns[0]]


def _newest(tally: Tally) -> Mapping[str, str | Text]:
    record = tally.latest
    ratio = None if record.drift is None else record.drift.update_to_weight
    return {
        "step": str(record.step),
        "outcome": Text(wording.outcome(record.outcome), style=_STYLES[record.outcome]),
        "loss": wording.number(record.loss),
        "loss scale": wording.loss_scale(record.loss_scale_before),
        "gradient norm": wording.number(record.gradient_norm),
        "update/weight": wording.number(ratio),
        "learning rates": _rates(record),
    }


def _totals(tally: Tally) -> Mapping[str, str | Text]:
    counts = {wording.outcome(outcome): str(count) for outcome, count in tally.counts.items()}
    return {**counts, "guard cost": wording.percent(tally.guard_share)}


def _summary(log: RunLog) -> Mapping[str, str]:
    state = ViewState()
    for record in log:
        state = state.after(record)
    (tally,) = state.tallies.values()
    losses = [record.loss for record in log if record.loss is not None]
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    updates = [
        record.drift.update_norm
        for record in log
        if record.drift is not None and record.outcome is StepOutcome.APPLIED
    ]
    guard_s = wording.duration(tally.guard_s)
    return {
        "attempted": str(tally.attempts),
        **{wording.outcome(outcome): str(count) for outcome, count in tally.counts.items()},
        "loss, first -> last": wording.fall(first, last),
        "update norm, min / median / max": wording.spread(updates),
        "time since the first step": wording.duration(tally.wall_s),
        "of it the guard": f"{guard_s} ({wording.percent(tally.guard_share)})",
    }


def _standard_output() -> Console:
    """Return a console that moves the cursor on a real terminal only.

    FORCE_COLOR makes rich take a pipe for a terminal; colours are welcome there, a panel is not.
    """
    return Console(force_interactive=None if sys.stdout.isatty() else False)


def _encodable(line: Text, encoding: str) -> Text:
    """Return the line, with question marks for what the output cannot write."""
    try:
        line.plain.encode(encoding)
    except UnicodeEncodeError:
        return Text(line.plain.encode(encoding, "replace").decode(encoding))
    return line

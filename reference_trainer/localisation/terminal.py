"""An evaluation in the terminal: progress while it runs, and its main table."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from reference_trainer.localisation.tables import bounds, measured, medians, number, percent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from reference_trainer.localisation.bench import Told
    from reference_trainer.localisation.report import Errors, EstimatorReport, NetworkReport


@contextmanager
def progress_on(console: Console) -> Iterator[Told]:
    """Show what is being done on a terminal, until the block ends; nothing elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # No refresh thread: it would compete with what is being timed.
    with Progress(
        *columns, console=console, auto_refresh=False, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=None)

        def told(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total, refresh=True)

        yield told


def errors_table(network: NetworkReport) -> Table:
    """Return the errors of every estimator beside the bound, the number known and estimated."""
    table = Table(
        "estimator",
        "scenes",
        "median azimuth, elevation (deg), range (m)",
        "bound",
        "within 2 deg",
        "number estimated",
        "ms a scene",
        title=f"symbols: {network.symbols}",
    )
    for one in network.estimators:
        known = measured(one.known).overall
        table.add_row(
            one.title,
            str(known.scenes),
            medians(known),
            bounds(known),
            percent(known.within_2_deg),
            _told(one.estimated, one),
            number(1e3 * one.cost.wall_s, 1),
        )
    return table


def counts_table(network: NetworkReport) -> Table:
    """Return how often each way to count is right."""
    table = Table("counted by", "scenes", "right", "too few", title="number of sources")
    for one in network.counters:
        summary = (one.all or one.subset).overall
        right, under = percent(summary.accuracy), percent(summary.under)
        table.add_row(one.title, str(summary.scenes), right, under)
    return table


def _told(errors: Errors | None, one: EstimatorReport) -> str:
    if errors is None:
        return number(None)
    summary = measured(errors).overall
    missed = f"{summary.missed} missed, {summary.false} false"
    return f"{medians(summary)} ({one.counted_by}: {missed})"

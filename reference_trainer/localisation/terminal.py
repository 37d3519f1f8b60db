"""An evaluation in the terminal: progress while it runs, and its main tables."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from reference_trainer.localisation.cells import (
    bound_rows,
    bounds,
    measured,
    medians,
    number,
    percent,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from reference_trainer.localisation.bench import Told
    from reference_trainer.localisation.report import NetworkReport

_COORDINATES = ("azimuth\ndeg", "elev.\ndeg", "range\nm")


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
    """Return the median errors of every estimator with the number known, beside the bound."""
    table = _table(
        "median errors,\nnumber known",
        *_COORDINATES,
        *("times\nbound", "within\n2 deg", "ms a\nscene", "scenes"),
        title=f"symbols: {network.symbols}",
    )
    for one in network.estimators:
        known = measured(one.known).overall
        table.add_row(
            one.title,
            *medians(known),
            number(known.azimuth_deg.median_over_bound),
            percent(known.within_2_deg),
            number(1e3 * one.cost.wall_s, 0),
            str(known.scenes),
        )
    for title, part in bound_rows(network):
        scenes = str(part.overall.scenes)
        table.add_row(title, *bounds(part.overall), "", "", "", scenes, style="bold")
    return table


def estimated_table(network: NetworkReport) -> Table:
    """Return the median errors of every estimator with the number of sources estimated."""
    table = _table(
        "median errors,\nnumber estimated",
        *_COORDINATES,
        *("missed", "false", "of", "counted\nby"),
    )
    for one in network.estimators:
        if one.estimated is not None:
            summary = measured(one.estimated).overall
            counts = (summary.missed, summary.false, summary.true_sources)
            table.add_row(one.title, *medians(summary), *map(str, counts), one.counted_by)
    return table


def counts_table(network: NetworkReport) -> Table:
    """Return how often each way to count is right."""
    table = _table("sources counted by", "scenes", "right", "too few")
    for one in network.counters:
        summary = (one.all or one.subset).overall
        right, under = percent(summary.accuracy), percent(summary.under)
        table.add_row(one.title, str(summary.scenes), right, under)
    return table


def _table(*header: str, title: str | None = None) -> Table:
    """Return an empty table that fits a narrow terminal."""
    return Table(*header, title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)

"""The parts that tables of a report are put together from, in Markdown and in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from reference_trainer.localisation.report import Breakdown, Errors, NetworkReport
    from reference_trainer.metrics import ErrorSummary

DASH = "-"
"""Stands where nothing was measured."""


def number(value: float | None, digits: int = 2) -> str:
    """Return a number in short, or a dash where nothing was measured."""
    return DASH if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Return a share in percent, or a dash."""
    return DASH if value is None else f"{100 * value:.0f} %"


def medians(summary: ErrorSummary) -> list[str]:
    """Return the median errors of azimuth, elevation and range."""
    coordinates = (summary.azimuth_deg, summary.elevation_deg, summary.range_m)
    return [number(coordinate.median) for coordinate in coordinates]


def bounds(summary: ErrorSummary) -> list[str]:
    """Return the medians of the bound of azimuth, elevation and range."""
    coordinates = (summary.azimuth_deg, summary.elevation_deg, summary.range_m)
    return [number(coordinate.median_bound) for coordinate in coordinates]


def measured(errors: Errors) -> Breakdown:
    """Return the errors on all scenes, or on the subset where there are no others."""
    return errors.subset if errors.all is None else errors.all


def bound_rows(network: NetworkReport) -> Iterator[tuple[str, Breakdown]]:
    """Yield the errors that hold the bound: on all scenes, and on the subset where that is smaller."""
    whole = next((one.known.all for one in network.estimators if one.known.all is not None), None)
    subset = network.estimators[0].known.subset
    if whole is not None:
        yield "bound", whole
    if whole is None or whole.overall.scenes != subset.overall.scenes:
        yield "bound, on the subset", subset


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

"""How good estimates are, in numbers for a table: every true source counts, found or not.

Shares are over all true sources: a missed one is within no distance of anything. Medians and root
mean squares are over the matched ones, and the numbers of missed and false sources stand beside
them. See ``matching`` for what matched means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from reference_trainer.matching import SourceErrors

    Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinateSummary:
    """Errors in one coordinate, over matched sources; None where there is none, or no bound.

    Attributes:
        median: median of the absolute error.
        rmse: root of the mean squared error.
        median_over_bound: median of absolute error over bound: 0.67 for an efficient estimator.
        median_bound: median of the bound over all true sources, in the unit of the error.
    """

    median: float | None
    rmse: float | None
    median_over_bound: float | None
    median_bound: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSummary:
    """Errors of an estimator on a set of scenes.

    Attributes:
        scenes: number of scenes.
        true_sources: number of true sources in them.
        matched: true sources with a partner.
        missed: true sources without one.
        false: estimates without one.
        azimuth_deg: errors in azimuth.
        elevation_deg: errors in elevation.
        range_m: errors in range.
        within_1_deg: share of true sources found with both angles within 1 degree; None for no
            true sources.
        within_2_deg: the same for 2 degrees.
        within_5_deg: the same for 5 degrees.
    """

    scenes: int
    true_sources: int
    matched: int
    missed: int
    false: int
    azimuth_deg: CoordinateSummary
    elevation_deg: CoordinateSummary
    range_m: CoordinateSummary
    within_1_deg: float | None
    within_2_deg: float | None
    within_5_deg: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SnrBin:
    """Errors in the scenes with ``low_db <= SNR < high_db``; the last bin includes its end."""

    low_db: float
    high_db: float
    summary: ErrorSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class CountSummary:
    """How well sources were counted.

    Attributes:
        scenes: number of scenes.
        accuracy: share of scenes with the right count.
        under: share of scenes with too low a count.
        over: share of scenes with too high a count.
        confusion: scenes by true count (rows) and estimated count (columns), both from 0.
    """

    scenes: int
    accuracy: float
    under: float
    over: float
    confusion: tuple[tuple[int, ...], ...]


def summarise(errors: SourceErrors) -> ErrorSummary:
    """Return the medians, root mean squares, shares and counts of ``errors``."""
    total, matched = len(errors.matched), int(errors.matched.sum())
    within = _shares_within(errors, (1.0, 2.0, 5.0))
    azimuth, elevation, distance = errors.bound.T
    degree = 180 / math.pi
    return ErrorSummary(
        scenes=len(errors.true_count),
        true_sources=total,
        matched=matched,
        missed=total - matched,
        false=int(errors.estimated_count.sum()) - matched,
        azimuth_deg=_coordinate(errors.azimuth_rad * degree, azimuth * degree),
        elevation_deg=_coordinate(errors.elevation_rad * degree, elevation * degree),
        range_m=_coordinate(errors.range_m, distance),
        within_1_deg=within[0],
        within_2_deg=within[1],
        within_5_deg=within[2],
    )


def by_snr(
    errors: SourceErrors, snr_db: Tensor, *, edges_db: Sequence[float]
) -> tuple[SnrBin, ...]:
    """Return a summary for each bin between neighbouring ``edges_db``.

    Args:
        errors: errors in B scenes.
        snr_db: ``[B]``.
        edges_db: rising, at least two; scenes outside all bins are an error, not dropped.

    Raises:
        ValueError: the edges do not rise, or a scene lies in no bin.
    """
    edges, values = np.asarray(edges_db, np.float64), snr_db.detach().double().cpu().numpy()
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"binning by SNR: edges are {list(edges_db)}; expected rising numbers")
    place = np.searchsorted(edges, values, side="right") - 1
    place[values == edges[-1]] = len(edges) - 2
    outside = ~((place >= 0) & (place < len(edges) - 1))
    if outside.any():
        raise ValueError(
            f"binning by SNR: {int(outside.sum())} scenes lie outside {edges[0]:g} to "
            f"{edges[-1]:g} dB; widen the edges, so that no scene is dropped"
        )
    return tuple(
        SnrBin(low_db=low, high_db=high, summary=summarise(errors.of_scenes(place == number)))
        for number, (low, high) in enumerate(zip(edges.tolist(), edges[1:].tolist(), strict=False))
    )


def by_count(errors: SourceErrors) -> dict[int, ErrorSummary]:
    """Return a summary for each true number of sources that occurs, in rising order."""
    counts = sorted(set(errors.true_count.tolist()))
    return {count: summarise(errors.of_scenes(errors.true_count == count)) for count in counts}


def count_summary(estimated: Tensor, true: Tensor, *, max_sources: int) -> CountSummary:
    """Return how well sources were counted.

    Args:
        estimated: int64 ``[B]``, from 0 to ``max_sources``.
        true: int64 ``[B]``, from 0 to ``max_sources``.
        max_sources: size of the confusion table.

    Raises:
        ValueError: no scenes, different numbers of them, or a count out of range.

    Sync: one copy of both to the host.
    """
    guesses, truths = estimated.cpu().numpy(), true.cpu().numpy()
    if guesses.shape != truths.shape or guesses.ndim != 1 or not len(guesses):
        raise ValueError(
            f"comparing counts: got shapes {guesses.shape} and {truths.shape}; expected [B] twice"
        )
    both = np.concatenate((guesses, truths))
    if both.min() < 0 or both.max() > max_sources:
        raise ValueError(
            f"comparing counts: counts reach from {both.min()} to {both.max()}; expected 0 to "
            f"{max_sources}"
        )
    table = np.zeros((max_sources + 1, max_sources + 1), np.int64)
    np.add.at(table, (truths, guesses), 1)
    return CountSummary(
        scenes=len(truths),
        accuracy=float((guesses == truths).mean()),
        under=float((guesses < truths).mean()),
        over=float((guesses > truths).mean()),
        confusion=tuple(tuple(row) for row in table.tolist()),
    )


def _coordinate(error: Reals, bound: Reals) -> CoordinateSummary:
    size = np.abs(error[~np.isnan(error)])
    ratio = np.abs(error) / bound
    return CoordinateSummary(
        median=_median(size),
        rmse=float(np.sqrt(np.mean(size**2))) if len(size) else None,
        median_over_bound=_median(ratio[~np.isnan(ratio)]),
        median_bound=_median(bound[~np.isnan(bound)]),
    )


def _median(values: Reals) -> float | None:
    return float(np.median(values)) if len(values) else None


def _shares_within(errors: SourceErrors, limits_deg: tuple[float, ...]) -> list[float | None]:
    if not len(errors.matched):
        return [None for _ in limits_deg]
    worst = np.degrees(np.maximum(np.abs(errors.azimuth_rad), np.abs(errors.elevation_rad)))
    # A missed source is NaN here, and NaN is within no limit.
    return [float((worst <= limit).mean()) for limit in limits_deg]

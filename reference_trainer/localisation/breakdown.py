"""Errors and counts on a set of scenes, whole and in parts: what a report holds of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reference_trainer.localisation.report import HIGH_SNR_DB, Breakdown, Counts, Efficiency, Errors
from reference_trainer.matching import source_errors
from reference_trainer.metrics import by_count, by_snr, count_summary, summarise
from reference_trainer.positions import true_positions

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.localisation.subject import HeldOut
    from reference_trainer.matching import SourceErrors
    from reference_trainer.metrics import CoordinateSummary, ErrorSummary
    from reference_trainer.positions import Positions

SNR_EDGES_DB = (-5.0, 0.0, 5.0, 10.0, 15.0, 20.0)

MEDIAN_OF_NORMAL = 0.6745
"""Median of the absolute value of a standard normal variable."""


def errors_of(positions: Positions, held_out: HeldOut, *, subset: int) -> Errors:
    """Return the errors of an estimator that ran on the first scenes, as many as it gave positions.

    Args:
        positions: on the CPU, of all scenes or of the first ``subset``.
        held_out: all scenes.
        subset: size of the subset.
    """
    scenes = held_out.scenes.select(slice(0, len(positions)))
    errors = source_errors(
        positions, true_positions(scenes), bound=held_out.bound[: len(positions)]
    )
    chosen = np.arange(len(positions)) < subset
    return Errors(
        all=breakdown(errors, scenes.snr_db) if len(positions) == len(held_out.scenes) else None,
        subset=breakdown(errors.of_scenes(chosen), scenes.snr_db[:subset]),
    )


def breakdown(errors: SourceErrors, snr_db: Tensor) -> Breakdown:
    """Return the summaries of all scenes, of those with a high SNR, and by SNR and number.

    Args:
        errors: in B scenes.
        snr_db: ``[B]``, within the range of the published scenes.

    Raises:
        ValueError: a scene lies outside that range.
    """
    counts = by_count(errors)
    return Breakdown(
        overall=summarise(errors),
        high_snr=summarise(errors.of_scenes(snr_db.numpy() >= HIGH_SNR_DB)),
        by_snr=by_snr(errors, snr_db, edges_db=SNR_EDGES_DB),
        by_count=counts,
        single_source=_efficiency(counts[1]) if 1 in counts else None,
    )


def _efficiency(summary: ErrorSummary) -> Efficiency:
    def over_normal(coordinate: CoordinateSummary) -> float | None:
        ratio = coordinate.median_over_bound
        return None if ratio is None else ratio / MEDIAN_OF_NORMAL

    return Efficiency(
        azimuth=over_normal(summary.azimuth_deg),
        elevation=over_normal(summary.elevation_deg),
        range=over_normal(summary.range_m),
    )


def counts_of(estimated: Tensor, held_out: HeldOut) -> Counts:
    """Return how well the sources of the first scenes were counted.

    Args:
        estimated: int64 ``[n]`` on the CPU, at least one.
        held_out: n or more scenes.
    """
    scenes = held_out.scenes.select(slice(0, len(estimated)))
    high, most = scenes.snr_db >= HIGH_SNR_DB, scenes.active.shape[1]
    return Counts(
        overall=count_summary(estimated, scenes.num_sources, max_sources=most),
        high_snr=(
            count_summary(estimated[high], scenes.num_sources[high], max_sources=most)
            if bool(high.any())
            else None
        ),
    )

"""What an evaluation of localisation found: one nested value that is written as JSON and read back.

``null`` in the JSON is "not measured": an estimator that ran on the subset only, a bin without
sources, or a number that is not finite. Schema version 1; the names below are those of the JSON.
"""

# No "from __future__ import annotations": pydantic reads the annotations when a file is read.
from dataclasses import dataclass
from typing import Any, Literal

from reference_trainer.metrics import CountSummary, ErrorSummary, SnrBin
from reference_trainer.physics import SymbolModel
from reference_trainer.scenes import Split

SCHEMA_VERSION: Literal[1] = 1
HIGH_SNR_DB = 10.0
"""Where "high SNR" begins in a report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What is the same for every network of a report.

    Attributes:
        seed: of the scenes.
        split: of the scenes.
        scenes: number of scenes: the first of the split.
        subset: the first of them, on which the slow estimators run as well.
        sample_share: share of the fitted covariance in the blend.
        threads: torch's threads, of each worker.
        workers: batches of scenes that were worked on at the same time.
        device: where everything ran.
        versions: of Python and the libraries.
    """

    seed: int
    split: Split
    scenes: int
    subset: int
    sample_share: float
    threads: int
    workers: int
    device: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Which network this is.

    Attributes:
        config: the whole configuration of its run, seeds included.
        checkpoint: name of the file.
        weights: SHA-256 of the weights.
        epoch: epochs finished.
        steps_taken: optimizer steps taken.
        validation_loss: loss on the held-out scenes of its run.
    """

    config: dict[str, Any]
    checkpoint: str
    weights: str
    epoch: int
    steps_taken: int
    validation_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disjointness:
    """Why no scene of the evaluation was trained on.

    Attributes:
        method: "fingerprints": the sources of every training scene were compared; "streams": the
            scenes come from random streams that training never draws from.
        compared: training scenes whose fingerprints were compared.
        reason: the same in a sentence.
        watched: scenes of the evaluation on which the run was judged while it went on: they decide
            no weight, but may have decided when to stop.
    """

    method: Literal["fingerprints", "streams"]
    compared: int
    reason: str
    watched: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Median of error over bound, over 0.6745: 1 for an efficient estimator with normal errors."""

    azimuth: float | None
    elevation: float | None
    range: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Errors on a set of scenes, whole and in parts.

    Attributes:
        overall: all scenes.
        high_snr: those with at least 10 dB.
        by_snr: by bins of 5 dB.
        by_count: by the true number of sources.
        single_source: scenes with one source, against the bound; None without any.
    """

    overall: ErrorSummary
    high_snr: ErrorSummary
    by_snr: tuple[SnrBin, ...]
    by_count: dict[int, ErrorSummary]
    single_source: Efficiency | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Errors on all scenes and on the subset; ``all`` is None where only the subset was measured."""

    all: Breakdown | None
    subset: Breakdown


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds a scene, from the raw scenes on, and over how many scenes they are the mean."""

    wall_s: float
    processor_s: float
    scenes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorReport:
    """One estimator.

    Attributes:
        key: as in ``estimators``.
        title: its name for readers.
        counted_by: what told it the number of sources; None where it was not run without.
        cost: of the run with the number of sources known.
        known: errors with the number of sources known.
        estimated: errors with the number of sources estimated.
    """

    key: str
    title: str
    counted_by: str | None
    cost: Cost
    known: Errors
    estimated: Errors | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How well sources were counted: in all scenes, and in those with at least 10 dB (or None)."""

    overall: CountSummary
    high_snr: CountSummary | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterReport:
    """One way to count; ``all`` is None where only the subset was counted."""

    key: str
    title: str
    cost: Cost
    all: Counts | None
    subset: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMeans:
    """Means of :class:`reference_trainer.covariance.RankReport` over scenes."""

    scenes: int
    count: float
    entropy_rank: float
    participation_ratio: float
    energy_in_top: float
    overlap: float
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CovarianceReport:
    """What the rank of one covariance is worth: over all scenes, and by number of sources."""

    key: str
    title: str
    overall: RankMeans
    by_count: dict[int, RankMeans]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkReport:
    """All that was measured with one network, on scenes of its symbol model.

    Attributes:
        symbols: the symbol model.
        origin: which network it is.
        disjoint: why no scene was trained on.
        network_paths_wall_s: what all rows and counts of the network took together, for all scenes,
            with the number of sources known and estimated.
        estimators: one entry for each, as in ``estimators``.
        counters: one entry for each way to count.
        covariances: of the truth, the fit, the network, their blend and the hybrid.
    """

    symbols: SymbolModel
    origin: Origin
    disjoint: Disjointness
    network_paths_wall_s: float
    estimators: tuple[EstimatorReport, ...]
    counters: tuple[CounterReport, ...]
    covariances: tuple[CovarianceReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole evaluation."""

    schema_version: Literal[1]
    conditions: Conditions
    networks: tuple[NetworkReport, ...]

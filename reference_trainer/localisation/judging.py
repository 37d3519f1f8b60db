"""Runs every estimator and every way to count on the same scenes, and times them."""

from __future__ import annotations

import platform
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, TypeVar

import torch

from reference_trainer.localisation.breakdown import counts_of, errors_of
from reference_trainer.localisation.counting import Counter, counters
from reference_trainer.localisation.covariances import covariance_report, factors, ranks
from reference_trainer.localisation.estimators import Estimator, estimators
from reference_trainer.localisation.report import (
    SCHEMA_VERSION,
    Conditions,
    Cost,
    CounterReport,
    CovarianceReport,
    EstimatorReport,
    NetworkReport,
    Report,
)
from reference_trainer.localisation.subject import HeldOut, Subject, draw_held_out
from reference_trainer.positions import Positions, concatenated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from reference_trainer.localisation.plan import Plan
    from reference_trainer.scenes import Scenes

    Told = Callable[[str, int, int], None]

BATCH_SCENES = 200
"""Scenes between two reports of progress; more would not be faster."""

_Part = TypeVar("_Part")


@torch.no_grad()
def judge(
    subjects: Sequence[Subject], plan: Plan, *, told: Told = lambda _, __, ___: None
) -> Report:
    """Return what every estimator reaches on scenes of each network's symbol model.

    While it works torch has ``plan.threads`` threads, and its old number afterwards.

    Args:
        subjects: networks on the device of the plan.
        plan: what to judge them on.
        told: hears what is being done, and how many scenes of how many are done.

    Raises:
        DataError: a network was trained on a scene it would be judged on.
    """
    with _threads(plan.threads):
        networks = tuple(_judged(subject, plan, told) for subject in subjects)
    return Report(schema_version=SCHEMA_VERSION, conditions=_conditions(plan), networks=networks)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _conditions(plan: Plan) -> Conditions:
    versions = {"python": platform.python_version()}
    for name in ("gradguard", "torch", "numpy", "scipy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return Conditions(
        seed=plan.seed,
        split=plan.split,
        scenes=plan.scenes,
        subset=plan.subset,
        sample_share=plan.share,
        threads=plan.threads,
        device=plan.device,
        versions=versions,
    )


def _judged(subject: Subject, plan: Plan, told: Told) -> NetworkReport:
    def announced(what: str, done: int, total: int) -> None:
        told(f"{subject.physics.symbols}: {what}", done, total)

    held_out = draw_held_out(
        subject,
        seed=plan.seed,
        split=plan.split,
        count=plan.scenes,
        told=lambda done, total: announced("comparing with training scenes", done, total),
    )
    bench = _Bench(subject, plan, held_out, held_out.scenes.to(plan.device), announced)
    counts = {one.key: bench.counted(one) for one in counters(subject.network)}
    network_wall_s = counts["head"][1].cost.wall_s * plan.scenes
    rows: list[EstimatorReport] = []
    for one in estimators(subject.network, share=plan.share):
        start = time.perf_counter()
        rows.append(bench.estimated(one, counts[one.counted_by][0] if one.counted_by else None))
        if one.counted_by == "head":
            network_wall_s += time.perf_counter() - start
    return NetworkReport(
        symbols=subject.physics.symbols,
        origin=subject.origin,
        disjoint=held_out.disjoint,
        network_paths_wall_s=network_wall_s,
        estimators=tuple(rows),
        counters=tuple(report for _, report in counts.values()),
        covariances=bench.covariances(),
    )


@dataclass(frozen=True, slots=True)
class _Bench:
    """Everything that is run on one set of scenes, which ``scenes`` holds on the device."""

    subject: Subject
    plan: Plan
    held_out: HeldOut
    scenes: Scenes
    told: Told

    def counted(self, counter: Counter) -> tuple[Tensor, CounterReport]:
        """Count the sources of all scenes, or of the subset."""
        parts, cost = self._timed(
            f"counting by {counter.title}",
            lambda rows: counter.count(self.subject.physics, self.scenes.select(rows)).cpu(),
            self._scenes_for(slow=counter.slow),
        )
        counts, subset = torch.cat(parts), self.plan.subset
        whole = counts_of(counts, self.held_out) if len(counts) == self.plan.scenes else None
        return counts, CounterReport(
            key=counter.key,
            title=counter.title,
            cost=cost,
            all=whole,
            subset=counts_of(counts[:subset], self.held_out),
        )

    def estimated(self, estimator: Estimator, counts: Tensor | None) -> EstimatorReport:
        """Run an estimator with the true number of sources, then with ``counts`` where they differ."""
        number = self._scenes_for(slow=estimator.slow)
        true = self.held_out.scenes.num_sources[:number]
        parts, cost = self._timed(
            estimator.title, lambda rows: self._located(estimator, rows, true[rows]), number
        )
        known, subset = concatenated(parts), self.plan.subset
        guessed = None
        if counts is not None:
            recounted = self._recounted(estimator, known, counts[:number])
            guessed = errors_of(recounted, self.held_out, subset=subset)
        return EstimatorReport(
            key=estimator.key,
            title=estimator.title,
            counted_by=estimator.counted_by,
            cost=cost,
            known=errors_of(known, self.held_out, subset=subset),
            estimated=guessed,
        )

    def covariances(self) -> tuple[CovarianceReport, ...]:
        """Return what the ranks of the four covariances are worth."""
        reports = []
        for key, factor in factors(self.subject.network, share=self.plan.share).items():
            parts = []
            for rows in self._batches(f"rank of the {key} covariance", self.plan.scenes):
                scenes = self.scenes.select(rows)
                parts.append(ranks(factor(self.subject.physics, scenes), scenes))
            reports.append(covariance_report(key, parts, self.held_out.scenes.num_sources))
        return tuple(reports)

    def _scenes_for(self, *, slow: bool) -> int:
        return self.plan.subset if slow else self.plan.scenes

    def _located(
        self, estimator: Estimator, rows: slice | Tensor, num_sources: Tensor
    ) -> Positions:
        """Positions on the CPU."""
        device = self.plan.device
        chosen = rows.to(device) if isinstance(rows, torch.Tensor) else rows
        scenes = self.scenes.select(chosen)
        return estimator.locate(self.subject.physics, scenes, num_sources.to(device)).to("cpu")

    def _recounted(self, estimator: Estimator, known: Positions, counts: Tensor) -> Positions:
        """Positions of ``counts`` sources; scenes are independent, so only new counts are run."""
        other = (counts != known.num_sources).nonzero().squeeze(-1)
        found = known.select(torch.arange(len(known)))
        for rows in self._batches(f"{estimator.title}, sources counted", len(other)):
            again = self._located(estimator, other[rows], counts[other[rows]])
            for name in ("azimuth_rad", "elevation_rad", "range_m", "active"):
                getattr(found, name)[other[rows]] = getattr(again, name)
        return found

    def _batches(self, what: str, count: int) -> Iterator[slice]:
        for start in range(0, count, BATCH_SCENES):
            self.told(what, start, count)
            yield slice(start, min(start + BATCH_SCENES, count))
        self.told(what, count, count)

    def _timed(
        self, what: str, work: Callable[[slice], _Part], count: int
    ) -> tuple[list[_Part], Cost]:
        """Run ``work`` on batches of the first ``count`` scenes, once untimed on two of them."""
        work(slice(0, 2))  # grids are laid out and remembered, libraries wake up
        parts, wall_s, processor_s = [], 0.0, 0.0
        for rows in self._batches(what, count):
            wall, processor = time.perf_counter(), time.process_time()
            parts.append(work(rows))
            wall_s += time.perf_counter() - wall
            processor_s += time.process_time() - processor
        return parts, Cost(wall_s=wall_s / count, processor_s=processor_s / count, scenes=count)

"""Runs every estimator and every way to count on the same scenes, and puts the report together."""

from __future__ import annotations

import platform
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from reference_trainer.localisation.bench import Bench
from reference_trainer.localisation.breakdown import counts_of, errors_of
from reference_trainer.localisation.counting import counters
from reference_trainer.localisation.covariances import covariance_report, factors, ranks
from reference_trainer.localisation.estimators import estimators
from reference_trainer.localisation.report import (
    SCHEMA_VERSION,
    Conditions,
    CounterReport,
    CovarianceReport,
    EstimatorReport,
    NetworkReport,
    Report,
)
from reference_trainer.localisation.subject import HeldOut, Subject, draw_held_out

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from reference_trainer.localisation.bench import Run, Told
    from reference_trainer.localisation.estimators import Estimator
    from reference_trainer.localisation.plan import Plan

_LIBRARIES = ("gradguard", "torch", "numpy", "scipy")


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
    for name in _LIBRARIES:
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
        workers=plan.workers,
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
    scenes = held_out.scenes.to(plan.device)
    bench = Bench(physics=subject.physics, scenes=scenes, told=announced, workers=plan.workers)
    counts, counter_reports = _all_counts(bench, subject, plan, held_out)
    rows, network_wall_s = _all_rows(bench, subject, plan, held_out, counts)
    head = next(report for report in counter_reports if report.key == "head")
    return NetworkReport(
        symbols=subject.physics.symbols,
        origin=subject.origin,
        disjoint=held_out.disjoint,
        network_paths_wall_s=network_wall_s + head.cost.wall_s * head.cost.scenes,
        estimators=rows,
        counters=counter_reports,
        covariances=_covariances(bench, subject, plan),
    )


def _all_counts(
    bench: Bench, subject: Subject, plan: Plan, held_out: HeldOut
) -> tuple[dict[str, Tensor], tuple[CounterReport, ...]]:
    """Count in every way; return the counts by key, and what they are worth."""
    found: dict[str, Tensor] = {}
    reports = []
    for counter in counters(subject.network):
        number = plan.subset if counter.slow else plan.scenes
        found[counter.key], cost = bench.count(counter, number)
        whole = counts_of(found[counter.key], held_out) if number == plan.scenes else None
        reports.append(
            CounterReport(
                key=counter.key,
                title=counter.title,
                cost=cost,
                all=whole,
                subset=counts_of(found[counter.key][: plan.subset], held_out),
            )
        )
    return found, tuple(reports)


def _all_rows(
    bench: Bench, subject: Subject, plan: Plan, held_out: HeldOut, counts: dict[str, Tensor]
) -> tuple[tuple[EstimatorReport, ...], float]:
    """Run every estimator; return what they reach, and the seconds of those that use the network."""
    rows, network_wall_s = [], 0.0
    for one in estimators(subject.network, share=plan.share):
        start = time.perf_counter()
        guessed = None if one.counted_by is None else counts[one.counted_by]
        run = bench.locate(one, plan.subset if one.slow else plan.scenes, guessed)
        if one.counted_by == "head":
            network_wall_s += time.perf_counter() - start
        rows.append(_row(one, run, held_out, plan))
    return tuple(rows), network_wall_s


def _row(one: Estimator, run: Run, held_out: HeldOut, plan: Plan) -> EstimatorReport:
    counted = run.counted
    return EstimatorReport(
        key=one.key,
        title=one.title,
        counted_by=one.counted_by,
        cost=run.cost,
        known=errors_of(run.known, held_out, subset=plan.subset),
        estimated=None if counted is None else errors_of(counted, held_out, subset=plan.subset),
    )


def _covariances(bench: Bench, subject: Subject, plan: Plan) -> tuple[CovarianceReport, ...]:
    reports = []
    for key, factor in factors(subject.network, share=plan.share).items():
        parts = []
        for rows in bench.batches(f"rank of the {key} covariance", plan.scenes):
            scenes = bench.scenes.select(rows)
            parts.append(ranks(factor(subject.physics, scenes), scenes))
        reports.append(covariance_report(key, parts, bench.scenes.num_sources.cpu()))
    return tuple(reports)

"""Inputs that hold the answer.

Looks at: the correlation of targets with single input features, and the share of floating targets that occur
verbatim in their own row of the inputs. Reported are features that are a copy of the target in every batch
read: labels and 0/1 targets by correlation, continuous ones by correlation and verbatim. Inputs of one or two
features are silent, and so are targets with several values per row (reconstructions, forecasts) and
sequences. Limits: a continuous target that leaks scaled or with noise is not seen: smooth series predict
their next value as well as that.

Sources: S. Kapoor and A. Narayanan, "Leakage and the reproducibility crisis in machine-learning-based
science", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._batches import count, features, is_floating, measured, of
from gradguard.rules._facts import batch
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG908",
    slug="target-leak",
    family="loss",
    severity=Severity.WARNING,
    summary="An input feature is the target itself.",
    remedy="Find the input column that holds the target (or was computed from it) and remove it.",
    needs=(Sight.INPUTS, Sight.TARGETS),
)


def check(
    run: Evidence, *, correlation: float = 0.9999, verbatim: float = 0.95, batches: int = 3
) -> Iterator[Finding]:
    """Report targets that can be read off one feature in every batch."""
    goals = [b for b in measured(of(run, "targets")) if b.input_correlation is not None]
    given = {(b.step, count(b)): b for b in of(run)}
    if len(goals) < batches or any(features(b) != 1 or not b.std for b in goals):
        return
    pairs = [(b, given.get((b.step, count(b)))) for b in goals]
    if any(i is None or len(i.shape) != 2 or i.shape[1] < 3 for _, i in pairs):
        return
    if all(_is_copied(b, correlation, verbatim) for b in goals):
        least = min(b.input_correlation or 0.0 for b in goals)
        yield RULE.finding(
            f"in all {len(goals)} batches read a feature of the inputs gives the target away (correlation of "
            f"at least {least:.5f})",
            place="targets",
            first_step=goals[0].step,
            last_step=goals[-1].step,
            evidence={"correlation": least, "batches": len(goals)},
        )


def _is_copied(goal: BatchReading, correlation: float, verbatim: float) -> bool:
    close = goal.input_correlation or 0.0
    if not close >= correlation:
        return False
    few = (goal.minimum, goal.maximum) in ((0.0, 1.0), (-1.0, 1.0))
    if not is_floating(goal) or few:
        return True
    # Zeros are not counted as verbatim: they occur everywhere.
    known = 1 - (goal.zero_fraction or 0.0)
    return known > 0 and (goal.input_equal or 0.0) >= verbatim * known


def _read(number: int, **leak: float) -> tuple[BatchReading, BatchReading]:
    goal = batch(number, "targets", dtype="float32", mean=0.0, std=1.0, zero_fraction=0.0, **leak)
    return batch(number), goal


def fires_on() -> RunLog:
    """The target was left in the table of the inputs."""
    facts = [f for i in range(3) for f in _read(i, input_correlation=1.0, input_equal=1.0)]
    return healthy(6, *facts)


def silent_on() -> RunLog:
    """Windows of a price: the last value nearly is the next one, and equals it now and then."""
    facts = [f for i in range(3) for f in _read(i, input_correlation=0.99995, input_equal=0.1)]
    return healthy(6, *facts)

"""Readings of replicas side by side."""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ReplicaReading


def together(run: Evidence) -> Iterator[tuple[int, list[ReplicaReading]]]:
    """Yield every step with the readings of its ranks, for steps that at least two ranks were read at."""
    steps: dict[int, dict[int, ReplicaReading]] = {}
    for one in run.of(ReplicaReading):
        steps.setdefault(one.step, {})[one.rank] = one
    for number in sorted(steps):
        ranks = steps[number]
        if len(ranks) > 1:
            yield number, [ranks[rank] for rank in sorted(ranks)]


def spread(values: list[float]) -> float:
    """Return largest minus smallest over the largest magnitude; 0.0 for equal values."""
    size = max(abs(value) for value in values)
    return (max(values) - min(values)) / size if size else 0.0

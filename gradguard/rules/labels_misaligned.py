"""Samples whose label changes from batch to batch: labels do not belong to their inputs.

Looks at: rows of inputs that come again in a later batch, and whether their target came with them. Shuffled
labels disagree as often as those of two random samples do; a few noisy labels do not, and augmented inputs
never come again. Batches whose rows repeat within themselves say nothing: their rows do not tell samples
apart. Limits: labels that were misplaced once and for all look like any others; needs samples that come again
(small data, or several epochs). Targets that are computed (observed ones that are no integers) are not
judged.

Sources: C. Zhang et al., "Understanding deep learning requires rethinking generalization", 2017.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._batches import features, inputs, is_floating, repeated, targets
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1001",
    slug="labels-misaligned",
    family="data",
    severity=Severity.ERROR,
    summary="The same sample comes with another label every time: labels do not belong to their inputs.",
    remedy="Shuffle inputs and targets with the same permutation; index both with the same index.",
    needs=(Sight.INPUTS, Sight.TARGETS),
)

Row = tuple[float, ...]


@dataclass(slots=True)
class _Seen:
    """What is known so far of one kind of batch."""

    label: dict[Row, float] = field(default_factory=dict)
    targets: list[float] = field(default_factory=list)
    again: int = 0
    other: int = 0
    first: int = 0
    last: int = 0


def check(
    run: Evidence, *, repeats: int = 8, share: float = 0.3, of_chance: float = 0.7
) -> Iterator[Finding]:
    """Report samples that come again with a target as different as that of any other sample."""
    seen: dict[tuple[str, str], _Seen] = {}
    for source, batch, labels in _pairs(run):
        if repeated(batch) <= 0.05:
            _add(seen.setdefault(source[:2], _Seen()), source[2], batch, labels)
    for (split, _), one in seen.items():
        if one.again < repeats or one.other / one.again < share:
            continue
        chance = _chance(one.targets)
        if chance > 0 and one.other / one.again >= of_chance * chance:
            yield RULE.finding(
                f"{one.other} of {one.again} samples of split {split!r} that came again had another target "
                f"than before (two random samples differ in {chance:.0%})",
                place="targets",
                first_step=one.first,
                last_step=one.last,
                evidence={"repeats": one.again, "share": one.other / one.again, "chance": chance},
            )


def _add(seen: _Seen, step: int, batch: tuple[Row, ...], labels: tuple[float, ...]) -> None:
    fresh: dict[Row, float] = {}
    for row, label in zip(batch, labels, strict=True):
        if row in seen.label:
            seen.again += 1
            if seen.label[row] != label:
                seen.first = step if seen.other == 0 else seen.first
                seen.other += 1
                seen.last = step
        fresh[row] = label
    seen.label |= fresh
    seen.targets += labels


def _chance(labels: list[float]) -> float:
    """Return how often two of these differ."""
    total = len(labels)
    return 1 - sum((times / total) ** 2 for times in Counter(labels).values())


def _pairs(
    run: Evidence,
) -> Iterator[tuple[tuple[str, str, int], tuple[Row, ...], tuple[float, ...]]]:
    """Yield split, source and step of every batch with its rows (all inputs together) and targets."""
    batches: dict[tuple[str, str, int], dict[str, list[BatchReading]]] = {}
    for one in run.of(BatchReading):
        source = "loader" if one.source == "loader" else "model"
        key = (one.split, source, one.step)
        batches.setdefault(key, {}).setdefault(one.tensor, []).append(one)
    for key, tensors in batches.items():
        labels = tensors.get("targets", [])
        given = [several for name, several in tensors.items() if name.startswith("inputs")]
        # Which batch belongs to which targets is known only if all of them were read.
        if not labels or not given or any(len(one) != len(labels) for one in given):
            continue
        for label, *parts in zip(labels, *given, strict=True):
            rows = [b.rows for b in parts if b.rows and b.shape[:1] == label.shape[:1]]
            whole = label.rows is not None and all(len(r) == len(label.rows) for r in rows)
            if rows and label.rows and whole and _are_samples(parts, label):
                yield key, tuple(zip(*rows, strict=True)), label.rows


def _are_samples(given: list[BatchReading], label: BatchReading) -> bool:
    """Whether a row is a sample with a label of its own.

    Not so: an id with many labels, a target that is computed, the other half of a pair.
    """
    if features(label) > 8:
        shape = label.shape[1:]
        same = any(b.shape[-len(shape) :] == shape for b in given)
        if is_floating(label) or not same:
            return False
    if label.source != "loader" and is_floating(label):
        return False
    return any(is_floating(b) for b in given) or sum(features(b) for b in given) >= 8


def _batch(number: int, shift: int, *, noisy: int = 0) -> tuple[BatchReading, BatchReading]:
    """Return the same 32 samples in a new order with labels that are moved by ``shift`` places."""
    order = [(i * 5 + number * 7) % 32 for i in range(32)]
    labels = tuple(float((i + shift) * 5 % 8) if i >= noisy else 9.0 + number for i in order)
    return inputs(number, rows=tuple(float(i) for i in order)), targets(number, rows=labels)


def fires_on() -> RunLog:
    """Inputs and labels are shuffled with a permutation each."""
    return healthy(6, *(one for i in range(3) for one in _batch(i, shift=i)))


def silent_on() -> RunLog:
    """The same samples three times: two noisy labels, and augmented inputs in a further step."""
    again = [one for i in range(3) for one in _batch(i, shift=0, noisy=2)]
    return healthy(6, *again, inputs(3), targets(3))

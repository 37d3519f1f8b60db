"""Batches of one class each: the order of the labels, or the labels themselves, prevent learning.

Looks at: integer targets of one number per row: whether the first 64 rows of a batch are of one class, and
which; the first 64 batches of a run and those of detailed steps are read. Shuffled batches are next to never
of one class while another batch is of another one; sorted data are. Limits: labels that are the same in every
batch may be a rare class that has not come yet, or the unused labels of a folder of images: they alarm only
for a loss over classes and after ``rows`` rows. A sorted order with several classes in every batch is left
alone.

Sources: https://docs.pytorch.org/docs/stable/data.html (shuffle).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading, LossReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._batches import count, features, inputs, is_floating, of, targets
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1002",
    slug="labels-degenerate",
    family="data",
    severity=Severity.ERROR,
    summary="Every batch holds one class only.",
    remedy="Shuffle the data (DataLoader(shuffle=True)), and look at how the labels are read.",
    needs=(Sight.TARGETS,),
)


def check(
    run: Evidence, *, batches: int = 3, pure: float = 0.8, rows: int = 512
) -> Iterator[Finding]:
    """Report targets of one class per batch, or of one class in all."""
    labels = [b for b in of(run, "targets") if _is_class_per_row(b)]
    one_class = [b for b in labels if len(set(b.rows or ())) == 1]
    if len(labels) < batches or len(one_class) < pure * len(labels):
        return
    by_step: dict[int, set[float]] = {}
    for batch in one_class:
        by_step.setdefault(batch.step, set()).update(batch.rows or ())
    if any(len(values) > 1 for values in by_step.values()):
        return  # several batches make one step: it sees several classes
    classes = {value for values in by_step.values() for value in values}
    if len(classes) > 1:
        if _may_take_turns(run, labels[0], len(classes)):
            return
        yield _finding(labels, len(classes), "holds one class only, another one in other batches")
    elif len(one_class) == len(labels):
        enough = sum(count(b) for b in labels) >= rows and _has_class_loss(run)
        yield _finding(labels, 1, "holds the same class", None if enough else Severity.INFO)


def _finding(
    labels: list[BatchReading], classes: int, what: str, severity: Severity | None = None
) -> Finding:
    return RULE.finding(
        f"every one of {len(labels)} batches {what} ({sum(count(b) for b in labels)} targets were read)",
        place="targets",
        first_step=labels[0].step,
        last_step=labels[-1].step,
        evidence={"batches": len(labels), "classes": classes},
        severity=severity,
    )


def _is_class_per_row(batch: BatchReading) -> bool:
    single = bool(batch.shape) and features(batch) == 1
    return single and count(batch) >= 8 and not is_floating(batch) and bool(batch.rows)


def _may_take_turns(run: Evidence, batch: BatchReading, classes: int) -> bool:
    """Whether two labels in turn can be those of a critic: real ones and made-up ones."""
    return classes == 2 and batch.source == "observe" and len(run.by_optimizer) > 1


def _has_class_loss(run: Evidence) -> bool:
    return any(
        node.name.startswith(("NllLoss", "CrossEntropy"))
        for reading in run.of(LossReading)
        for node in reading.nodes
    )


def _pure(number: int, label: float) -> BatchReading:
    return targets(number, rows=(label,) * 32)


def fires_on() -> RunLog:
    """Data sorted by class: batches of class 0, then of class 1."""
    return healthy(8, *(inputs(i) for i in range(4)), *(_pure(i, float(i // 2)) for i in range(4)))


def silent_on() -> RunLog:
    """Rare positives: most batches hold negatives only, and one batch both."""
    labels = [_pure(i, 0.0) for i in range(4)]
    mixed = targets(4, rows=(0.0,) * 31 + (1.0,))
    return healthy(8, *(inputs(i) for i in range(5)), *labels, mixed)

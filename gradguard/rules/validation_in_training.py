"""Samples of the validation that the training sees, too.

Looks at: fingerprints of rows of every split against those of the training split. Only rows that tell samples
apart are compared: many values, of which there are many different ones, and no repeats within the batches.
Splits whose name begins with "train" may hold training samples. Limits: up to 32 rows of some batches are
read, so that an overlap is found early in small data and late or never in large ones; augmented training
samples are not recognised.

Sources: S. Kapoor and A. Narayanan, "Leakage and the reproducibility crisis in machine-learning-based
science", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._batches import inputs, repeated, samples
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1007",
    slug="validation-in-training",
    family="data",
    severity=Severity.ERROR,
    summary="Samples of this split are in the training split as well: its numbers say nothing new.",
    remedy="Split before samples are copied, oversampled or cut into windows, and by group where samples "
    "belong together.",
    needs=(Sight.INPUTS, Sight.SPLITS),
)

Shape = tuple[tuple[int, ...], str]


def check(run: Evidence, *, rows: int = 3, share: float = 0.05) -> Iterator[Finding]:
    """Report every split of which a few per cent of the rows were met in training."""
    trained: dict[Shape, set[float]] = {}
    others: dict[str, list[BatchReading]] = {}
    for batch in samples(run):
        if repeated(batch.rows or ()) > 0.1:
            continue
        if batch.split == "train":
            trained.setdefault(_shape(batch), set()).update(batch.rows or ())
        elif not batch.split.startswith("train"):
            others.setdefault(batch.split, []).append(batch)
    for split, batches in others.items():
        known = {row for batch in batches for row in batch.rows or ()}
        hits = [b for b in batches if trained.get(_shape(b), set()).intersection(b.rows or ())]
        met = {row for b in hits for row in b.rows or () if row in trained[_shape(b)]}
        if len(met) >= rows and len(met) >= share * len(known):
            yield RULE.finding(
                f"{len(met)} of {len(known)} samples of split {split!r} that were read are training samples "
                "as well",
                place=split,
                first_step=hits[0].step,
                last_step=hits[-1].step,
                evidence={"rows": len(met), "share": len(met) / len(known)},
            )


def _shape(batch: BatchReading) -> Shape:
    return batch.shape[1:], batch.dtype


def fires_on() -> RunLog:
    """A random split that was made after the minority class was oversampled."""
    known = inputs(0).rows or ()
    mixed = (*known[:8], *(5000.0 + i for i in range(24)))
    facts = (*(inputs(i) for i in range(3)), inputs(3, split="validation", rows=mixed))
    return healthy(6, *facts)


def silent_on() -> RunLog:
    """Two validation samples that are duplicates of training samples."""
    known = inputs(0).rows or ()
    mixed = (*known[:2], *(5000.0 + i for i in range(30)))
    facts = (*(inputs(i) for i in range(3)), inputs(3, split="validation", rows=mixed))
    return healthy(6, *facts)

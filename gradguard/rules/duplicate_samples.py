"""Samples that repeat where they should differ.

Looks at: rows of the loader's batches. Workers of an iterable data set that were not told to share it give
every batch once each: the same batch again at once, and then the next one, twice as well. Rows that repeat
within one batch are a wrong index or a wrong sampler. The same batch throughout may be a test of overfitting:
it is only noted, and so are repeated rows that no loader made (several draws per sample). Ids and features of
few values are left out. Limits: needs ``guard.batches``; the same random augmentation of different samples is
not seen.

Sources: https://docs.pytorch.org/docs/stable/data.html (IterableDataset: duplicate data with several workers).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._batches import count, inputs, is_floating, measured, of, repeated, samples
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1006",
    slug="duplicate-samples",
    family="data",
    severity=Severity.WARNING,
    summary="The same samples come again where others were due.",
    remedy="Split an IterableDataset by torch.utils.data.get_worker_info(), and look at the sampler and "
    "at __getitem__.",
    needs=(Sight.INPUTS,),
)


def check(
    run: Evidence, *, batches: int = 3, rows: int = 8, share: float = 0.5
) -> Iterator[Finding]:
    """Report batches whose rows repeat, within the batch or in the next one."""
    rich = {id(b) for b in samples(run)}
    read = [b for b in of(run) if id(b) in rich and is_floating(b) and count(b) >= rows]
    # Batches of equal rows throughout are another problem.
    if len(read) < batches or all(b.constant_features == 1.0 for b in measured(read)):
        return
    shares = [repeated(b.rows or ()) for b in read]
    loader = read[0].source == "loader"
    if min(shares) > share:
        yield _finding(
            f"{min(shares):.0%} of the rows of every batch read are equal to an earlier row of the batch",
            read,
            min(shares),
            None if loader else Severity.INFO,
        )
    elif loader:
        yield from _between(read)


def _between(read: Sequence[BatchReading]) -> Iterator[Finding]:
    """Report batches that are equal to the one before: several, or all of them."""
    pairs = [(a, b) for a, b in pairwise(read) if b.step - a.step <= 1]
    same = [(a, b) for a, b in pairs if a.rows == b.rows]
    if same and all(b.rows == read[0].rows for b in read):
        yield _finding("every batch read held the same samples", read, 1.0, Severity.INFO)
    elif len({b.rows for _, b in same}) >= 2:  # one batch alone may be a test of overfitting
        yield _finding(
            f"{len(same)} of {len(pairs)} batches were the one before over again",
            [same[0][0], same[-1][1]],
            len(same) / len(pairs),
        )


def _finding(
    message: str, batches: Sequence[BatchReading], share: float, severity: Severity | None = None
) -> Finding:
    return RULE.finding(
        message,
        place=batches[0].tensor,
        first_step=batches[0].step,
        last_step=batches[-1].step,
        evidence={"share": share, "batches": len(batches)},
        severity=severity,
    )


def fires_on() -> RunLog:
    """Two workers of an iterable data set: every batch comes twice."""
    return healthy(8, *(inputs(i, rows=inputs(i // 2).rows) for i in range(4)))


def silent_on() -> RunLog:
    """A data set of two batches in a fixed order."""
    return healthy(8, *(inputs(i, rows=inputs(i % 2).rows) for i in range(4)))

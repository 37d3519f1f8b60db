"""Replicas that are given the same rows.

Looks at: fingerprints of the rows that each rank was given, in three readings in a row. Limits: a data set
that is smaller than one batch repeats on all ranks by necessity.

Sources: https://docs.pytorch.org/docs/stable/data.html#torch.utils.data.distributed.DistributedSampler.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import replica
from gradguard.rules._ranks import together
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1304",
    slug="replica-same-data",
    family="distributed",
    severity=Severity.WARNING,
    summary="Replicas train on the same samples.",
    remedy="Give every rank its own part of the data: DistributedSampler with the rank, "
    "set_epoch in every epoch, and a seed that is the same on all ranks.",
    needs=(Sight.REPLICAS,),
)


def check(run: Evidence, *, readings: int = 3, rows: int = 4) -> Iterator[Finding]:
    """Report ranks whose batches hold the same rows in three readings in a row."""
    streak: list[int] = []
    for step, ranks in together(run):
        batches = [set(one.rows) for one in ranks]
        same = len(batches[0]) >= rows and all(one == batches[0] for one in batches)
        streak = [*streak, step] if same else []
        if len(streak) == readings:
            yield RULE.finding(
                f"{len(ranks)} replicas were given the same {len(batches[0])} rows, {readings} times in a row",
                place="inputs",
                first_step=streak[0],
                last_step=step,
                evidence={"rows": len(batches[0]), "ranks": len(ranks)},
            )
            return


def fires_on() -> RunLog:
    """Every rank iterates over the whole data in the same order."""
    rows = tuple(float(i) for i in range(8))
    return healthy(4, *[replica(i, r, rows=rows) for i in range(3) for r in (0, 1)])


def silent_on() -> RunLog:
    """Rows of their own."""
    return healthy(4, *[replica(i, r) for i in range(3) for r in (0, 1)])

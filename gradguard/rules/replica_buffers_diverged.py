"""Replicas with equal weights and different running statistics.

Looks at: fingerprints of floating buffers on every rank after the same step. Limits: DDP broadcasts the
buffers of rank 0 at the next forward, so that a small difference right after a step is usual: only buffers
that are apart by more than a tenth are reported.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import replica
from gradguard.rules._ranks import spread, together
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1302",
    slug="replica-buffers-diverged",
    family="distributed",
    severity=Severity.WARNING,
    summary="The buffers of data-parallel replicas differ although their parameters agree.",
    remedy="Use SyncBatchNorm, or save and evaluate with the buffers of one rank on purpose.",
    needs=(Sight.REPLICAS,),
)


def check(run: Evidence, *, tolerance: float = 0.1, readings: int = 2) -> Iterator[Finding]:
    """Report buffers that are far apart in two readings while the parameters agree."""
    seen: list[int] = []
    for step, ranks in together(run):
        buffers = [one.buffers for one in ranks if one.buffers is not None]
        if len(buffers) < len(ranks) or not spread([one.parameters for one in ranks]) <= 1e-9:
            continue
        if not spread(buffers) <= tolerance:
            seen.append(step)
        if len(seen) == readings:
            yield RULE.finding(
                f"buffers of {len(ranks)} replicas differ by {spread(buffers):.0%}",
                place="buffers",
                first_step=seen[0],
                last_step=step,
                evidence={"relative_difference": spread(buffers), "ranks": len(ranks)},
            )
            return


def fires_on() -> RunLog:
    """Running statistics of each rank's own data, never broadcast."""
    return healthy(4, *[replica(i, r, buffers=1.0 + r) for i in range(3) for r in (0, 1)])


def silent_on() -> RunLog:
    """A small difference until the next forward."""
    return healthy(4, *[replica(i, r, buffers=1.0 + 0.01 * r) for i in range(3) for r in (0, 1)])

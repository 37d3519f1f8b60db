"""Replicas with equal weights and different running statistics.

Looks at: fingerprints of floating buffers on every rank after the same step. DDP broadcasts the buffers of rank
0 before every forward, so that right after a step they are apart by what one batch does to them, and stay
so; buffers that nobody broadcasts move apart from step to step. Limits: replicas that have been apart for
long are reported only when they are far apart.

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


def check(
    run: Evidence, *, tolerance: float = 0.1, growth: float = 1.5, apart: float = 0.4
) -> Iterator[Finding]:
    """Report buffers that move apart from reading to reading, or stay far apart, with equal parameters."""
    seen: list[tuple[int, float]] = []
    for step, ranks in together(run):
        buffers = [one.buffers for one in ranks if one.buffers is not None]
        if len(buffers) < len(ranks) or not spread([one.parameters for one in ranks]) <= 1e-9:
            continue
        seen.append((step, spread(buffers)))
        (first, before), (last, now) = seen[0], seen[-1]
        # NaN is no agreement: it fails these tests and is reported.
        is_apart = not now <= tolerance and (not now <= growth * before or not now < apart)
        if len(seen) > 1 and is_apart:
            yield RULE.finding(
                f"buffers of {len(ranks)} replicas differ by {now:.0%}, and by {before:.0%} at step {first}",
                place="buffers",
                first_step=first,
                last_step=last,
                evidence={"relative_difference": now, "ranks": len(ranks)},
            )
            return


def fires_on() -> RunLog:
    """Running statistics of each rank's own data, never broadcast."""
    return healthy(4, *[replica(i, r, buffers=1.0 + r) for i in range(3) for r in (0, 1)])


def silent_on() -> RunLog:
    """Broadcast before every forward, and apart by the statistics of one batch."""
    return healthy(4, *[replica(i, r, buffers=1.0 + 0.15 * r) for i in range(3) for r in (0, 1)])

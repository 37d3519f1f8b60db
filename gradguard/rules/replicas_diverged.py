"""Replicas that hold different weights.

Looks at: fingerprints of the parameters on every rank after the same step. Limits: the logs of all ranks have
to be judged together; ranks that hold different shards of one model (FSDP, tensor parallel) differ on purpose
and are not fingerprinted.

Sources: https://docs.pytorch.org/docs/stable/notes/ddp.html.
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
    code="GG1301",
    slug="replicas-diverged",
    family="distributed",
    severity=Severity.ERROR,
    summary="The parameters of data-parallel replicas differ.",
    remedy="Broadcast the parameters once at the start, reduce every gradient before the step, "
    "and take or skip steps on all ranks alike.",
    needs=(Sight.REPLICAS,),
)


def check(run: Evidence, *, tolerance: float = 1e-9) -> Iterator[Finding]:
    """Report the first step after which the parameters differ between ranks."""
    for step, ranks in together(run):
        apart = spread([one.parameters for one in ranks])
        if not apart <= tolerance:  # NaN differs
            yield RULE.finding(
                f"the parameters of {len(ranks)} replicas differ after step {step}",
                place="parameters",
                first_step=step,
                evidence={"relative_difference": apart, "ranks": len(ranks)},
            )
            return


def fires_on() -> RunLog:
    """Each rank walks its own way."""
    return healthy(
        4, *[replica(i, r, parameters=10.0 + i * (1 + r)) for i in range(3) for r in (0, 1)]
    )


def silent_on() -> RunLog:
    """Equal weights from unequal data."""
    return healthy(4, *[replica(i, r) for i in range(3) for r in (0, 1)])

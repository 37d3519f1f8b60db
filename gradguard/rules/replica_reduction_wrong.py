"""Gradients that are not the mean over the ranks.

Looks at: the gradients that each rank took its step with, and their sampled norm beside the norms before any
reduction. A mean is never longer than the longest of its parts. Limits: a sum that is clipped afterwards can
hide.

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
    code="GG1303",
    slug="replica-reduction-wrong",
    family="distributed",
    severity=Severity.ERROR,
    summary="Gradients are reduced across replicas with a wrong factor, or not at all.",
    remedy="Average the gradients over the ranks exactly once: DDP does it; divide by the world "
    "size after an all_reduce(SUM) of your own.",
    needs=(Sight.REPLICAS,),
    explains=("GG1301",),
)


def check(run: Evidence, *, tolerance: float = 1e-6, longer: float = 1.05) -> Iterator[Finding]:
    """Report the first step with different gradients, or with one longer than every rank's own."""
    for step, ranks in together(run):
        gradients = [one.gradients for one in ranks if one.gradients is not None]
        apart = spread(gradients) if len(gradients) == len(ranks) else 0.0
        local = max((one.local_norm or 0.0 for one in ranks), default=0.0)
        reduced = max((one.reduced_norm or 0.0 for one in ranks), default=0.0)
        factor = reduced / local if local else 0.0
        if not apart <= tolerance or factor > longer:
            what = (
                "differ"
                if not apart <= tolerance
                else f"are {factor:.2g} times the longest rank's own"
            )
            yield RULE.finding(
                f"the gradients that {len(ranks)} replicas step with {what}",
                place="gradients",
                first_step=step,
                evidence={"relative_difference": apart, "factor": factor},
            )
            return


def fires_on() -> RunLog:
    """An all_reduce with SUM and no division."""
    return healthy(4, *[replica(i, r, reduced_norm=0.2) for i in range(3) for r in (0, 1)])


def silent_on() -> RunLog:
    """The mean of two gradients that partly cancel."""
    return healthy(4, *[replica(i, r, reduced_norm=0.05) for i in range(3) for r in (0, 1)])

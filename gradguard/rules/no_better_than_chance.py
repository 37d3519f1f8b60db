"""A quantity that is meant to carry the signal and is no better than chance.

Looks at: a comparison that was told to guard.probe as ``"at chance"``: how well something (an estimate, a
feature, a pseudo-label) agrees with the truth, divided by how well a random one would. 1 is chance. An estimate
without signal costs nothing to see and everything to miss: the loss still falls, and what is blended with
it gets worse. Limits: needs the comparison, on more than a few samples.

Sources: a published sample covariance whose estimator subtracted the mean of coherent snapshots: its overlap
with the signal subspace was 0.024 where chance is 0.020.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ProbeReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import probe
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1011",
    slug="no-better-than-chance",
    family="data",
    severity=Severity.ERROR,
    summary="What is meant to carry the signal agrees with the truth no better than chance.",
    remedy="Follow the signal through its computation step by step; look for a mean that is subtracted, a "
    "wrong axis, and a wrong order of the same values.",
    needs=(Sight.STEPS,),
)


def check(run: Evidence, *, times: float = 1.5) -> Iterator[Finding]:
    """Report agreement below ``times`` chance."""
    for one in run.of(ProbeReading):
        # NaN is no agreement: it fails this test and is reported.
        if one.kind != "at chance" or one.value is None or one.value >= times:
            continue
        what = one.op or one.parameter or "the quantity"
        yield RULE.finding(
            f"{what} agrees with the truth {one.value:.2f} times as well as chance",
            place=what,
            first_step=one.step,
            evidence={"over_chance": one.value},
        )
        return


def fires_on() -> RunLog:
    """A sample covariance whose overlap with the signal subspace is chance."""
    return healthy(4, probe(0, "at chance", value=1.1, op="sample covariance"))


def silent_on() -> RunLog:
    """An overlap of eight times chance."""
    return healthy(4, probe(0, "at chance", value=8.0, op="sample covariance"))

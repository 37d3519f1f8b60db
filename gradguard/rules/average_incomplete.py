"""An average that is not one of this model.

Looks at: the share of the live parameters' names that the averaged copy has, and NaN or Inf in it while the
live weights are finite. Limits: an average of the trainable parameters only is healthy: a copy without frozen
ones is not reported.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import CopyReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import copied
from gradguard.rules._runs import healthy, setup
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1205",
    slug="average-incomplete",
    family="averaging",
    severity=Severity.WARNING,
    summary="An averaged copy lacks parameters of the model, or holds NaN.",
    remedy="Make the average from the model as it is trained (same names, after every layer was "
    "added), and from finite weights.",
    needs=(Sight.COPIES,),
)


def check(run: Evidence, *, share: float = 0.999) -> Iterator[Finding]:
    """Report an average with fewer parameters than are trained, or one that is not finite."""
    known = run.parameters.values()
    trainable = sum(one.trainable for one in known) / max(1, len(known)) if known else 1.0
    told: set[str] = set()
    for one in run.of(CopyReading):
        broken = bool(one.nonfinite)
        if one.role != "averaged" or one.name in told:
            continue
        if broken or one.matched < share * trainable:
            told.add(one.name)
            what = (
                "holds NaN or Inf" if broken else f"has {one.matched:.0%} of the model's parameters"
            )
            yield RULE.finding(
                f"copy {one.name!r} {what}",
                place=one.name,
                first_step=one.step,
                evidence={"matched": one.matched, "nonfinite": float(broken)},
            )


def fires_on() -> RunLog:
    """The names of the average carry a prefix that nothing else has."""
    return healthy(4, setup(), *[copied(i, matched=0.0) for i in range(3)])


def silent_on() -> RunLog:
    """All parameters are there."""
    return healthy(4, *[copied(i) for i in range(3)])

"""An optimizer that was made anew during the run.

Looks at: steps of optimizers that are not watched on parameters of the watched model, while the watched
optimizer of the same class stands still. Limits: needs two such steps.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ForeignStep
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG311",
    slug="optimizer-replaced",
    family="optimizer",
    severity=Severity.ERROR,
    summary="Another optimizer steps the model's parameters, and the watched one has stopped.",
    remedy="Keep one optimizer for the whole run, or watch the new one; a new optimizer begins "
    "without momentum and second moments.",
    needs=(Sight.STEPS,),
    explains=(
        "GG703",
        "GG309",
    ),
)


def check(run: Evidence, *, steps: int = 2) -> Iterator[Finding]:
    """Report an optimizer that has taken the place of the watched one."""
    for one in run.of(ForeignStep):
        if one.same_kind and one.shared and one.count >= steps:
            yield RULE.finding(
                f"{one.kind} optimizers that are not watched step {one.shared} parameters of the "
                "model, while the "
                "watched one has stopped",
                place=one.kind,
                first_step=one.step,
                evidence={"shared": one.shared, "steps": one.count},
            )
            return


def fires_on() -> RunLog:
    """A new optimizer in every epoch."""
    return healthy(4, ForeignStep(step=4, kind="AdamW", shared=4, same_kind=True, count=2))


def silent_on() -> RunLog:
    """A second optimizer that takes turns with the watched one."""
    return healthy(4, *[ForeignStep(step=i, kind="SGD", shared=1, count=i + 1) for i in range(3)])

"""Restored weights that are not the ones training begins with.

Looks at: parameters that a load_state_dict brought, compared with what they hold at the next optimizer step.
Limits: weights that are swapped on purpose in between (an average for validation that is not swapped back)
look the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import WeightsChanged
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1402",
    slug="weights-reinitialised",
    family="checkpoint",
    severity=Severity.ERROR,
    summary="Weights that had been loaded were overwritten before the first step.",
    remedy="Initialise first and load afterwards; look for init functions, reset_parameters() "
    "and post_init() behind load_state_dict.",
    needs=(Sight.STEPS,),
)


def check(run: Evidence, *, parameters: int = 1) -> Iterator[Finding]:
    """Report loaded parameters that changed outside of a step."""
    for one in run.of(WeightsChanged):
        if one.loaded_before and not one.after_load and one.count >= parameters:
            yield RULE.finding(
                f"{one.count} parameters no longer hold what was loaded, among them "
                f"{', '.join(one.parameters[:3])}",
                place=one.parameters[0],
                first_step=one.step,
                evidence={"parameters": one.count},
            )


def fires_on() -> RunLog:
    """An init function runs after the load."""
    changed = WeightsChanged(step=0, parameters=("first.weight",), count=2, loaded_before=True)
    return healthy(4, changed)


def silent_on() -> RunLog:
    """A second load explains the change."""
    again = WeightsChanged(
        step=0, parameters=("first.weight",), count=4, loaded_before=True, after_load=True
    )
    return healthy(4, again)

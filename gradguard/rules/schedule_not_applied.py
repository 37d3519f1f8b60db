"""A learning-rate schedule that is bound to an optimizer nobody steps.

Looks at: the schedulers of the process whose optimizer is not watched but holds parameters of the model.
Limits: an optimizer that is stepped and not watched looks the same; pass all of them to ``watch``.

Sources: https://docs.pytorch.org/docs/stable/optim.html (how to adjust learning rate).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import SchedulerFacts, Setup
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG403",
    slug="schedule-not-applied",
    family="schedule",
    severity=Severity.WARNING,
    summary="The schedule changes the rates of an optimizer other than the one that is stepped.",
    remedy="Make the scheduler from the optimizer that is stepped, after that has been made for the last "
    "time.",
    needs=(Sight.SCHEDULER,),
)


def check(run: Evidence) -> Iterator[Finding]:
    """Report schedulers of unwatched optimizers on the model's parameters."""
    seen: set[str] = set()
    for around in run.of(Setup):
        for one in around.schedulers:
            if (
                one.optimizer is not None
                or not one.settings.get("shares_parameters")
                or one.kind in seen
            ):
                continue
            seen.add(one.kind)
            yield RULE.finding(
                f"a {one.kind} changes the learning rates of an optimizer that holds the model's parameters "
                "and is not the one that is stepped",
                place=one.kind,
                first_step=around.step,
                evidence={"scheduler_steps": one.settings.get("last_epoch", 0.0)},
            )


def fires_on() -> RunLog:
    """The optimizer was made anew, the schedule was not."""
    other = SchedulerFacts(kind="StepLR", optimizer=None, settings={"shares_parameters": 1.0})
    return run([step(i) for i in range(4)], setup(schedulers=(other,)))


def silent_on() -> RunLog:
    """The schedule of the watched optimizer, and one of another model."""
    own = SchedulerFacts(kind="StepLR", optimizer="optimizer", settings={"shares_parameters": 1.0})
    other = SchedulerFacts(kind="StepLR", optimizer=None, settings={"shares_parameters": 0.0})
    return run([step(i) for i in range(4)], setup(schedulers=(own, other)))

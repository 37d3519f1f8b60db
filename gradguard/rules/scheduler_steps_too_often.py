"""A schedule that is advanced several times for every optimizer step.

Looks at: how often the scheduler has been stepped when an optimizer step begins. Limits: a schedule that is
meant to count samples or micro-batches looks the same.

Sources: https://docs.pytorch.org/docs/stable/optim.html (how to adjust learning rate).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG401",
    slug="scheduler-steps-too-often",
    family="schedule",
    severity=Severity.WARNING,
    summary="The scheduler is advanced several times per optimizer step.",
    remedy="Call scheduler.step() once after every optimizer step that was taken (or once per epoch).",
    needs=(Sight.STEPS,),
)


def check(run: Evidence, *, steps: int = 3, times: int = 2) -> Iterator[Finding]:
    """Report optimizers with a scheduler that is stepped at least twice a step, several steps in a row."""
    for name, records in run.by_optimizer.items():
        counted = [
            (r.step, r.window.scheduler_steps[0])
            for r in records
            if r.window and r.window.scheduler_steps
        ]
        row = 0
        for (_, before), (number, now) in pairwise(counted):
            row = row + 1 if now - before >= times else 0
            if row == steps:
                yield RULE.finding(
                    f"the scheduler of {name!r} is stepped {now - before} times for every optimizer step",
                    place=name,
                    first_step=number - steps,
                    last_step=number,
                    evidence={"scheduler_steps": now - before},
                )
                break


def fires_on() -> RunLog:
    """Four scheduler steps for every optimizer step."""
    return run([step(i, window={"scheduler_steps": (4 * i,)}) for i in range(6)], setup())


def silent_on() -> RunLog:
    """One scheduler step each, and an epoch that resumes at 100."""
    return run([step(i, window={"scheduler_steps": (100 + i,)}) for i in range(6)], setup())

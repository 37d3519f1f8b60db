"""A schedule made for a run much longer than this one.

Looks at: after how many calls the schedule has run its course, beside the optimizer steps that are planned, for
schedules that are stepped with the optimizer. A run that ends after a fraction of its cosine has trained at
high rates only, and the annealing that the schedule was chosen for never came. Limits: without a declared plan
it is a note at the end of the run: a run may be short because it was a trial.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.CosineAnnealingLR.html.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import Plan, RunEnd, SchedulerFacts, Setup
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG404",
    slug="plan-too-long",
    family="schedule",
    severity=Severity.WARNING,
    summary="The schedule is made for many more steps than the run has.",
    remedy="Set T_max or total_steps to the number of optimizer steps of the run: batches per epoch, times "
    "epochs, divided by micro-steps.",
    needs=(Sight.STEPS, Sight.SCHEDULER),
)


def check(run: Evidence, *, times: float = 2.0, fraction: float = 0.25) -> Iterator[Finding]:
    """Report schedules longer than ``times`` the plan, or left at less than a ``fraction`` of their course."""
    schedulers: dict[str, SchedulerFacts] = {}
    for around in run.of(Setup):
        schedulers |= {one.optimizer: one for one in around.schedulers if one.optimizer is not None}
    intended, end = run.plan.steps, run.end
    for name, one in schedulers.items():
        records = run.by_optimizer.get(name, ())
        planned = one.planned_steps
        if not planned or not _is_stepped_with_optimizer(records):
            continue
        if intended is not None and planned > times * intended:
            yield _found(one, records, planned, intended, "are planned", Severity.WARNING)
        elif (
            intended is None and end is not None and end.clean and len(records) < fraction * planned
        ):
            yield _found(one, records, planned, len(records), "were made", Severity.INFO)


def _is_stepped_with_optimizer(records: tuple[StepRecord, ...]) -> bool:
    """Whether the (only) scheduler is stepped about once per optimizer step, and not once per epoch."""
    counted = [r for r in records if r.window is not None and len(r.window.scheduler_steps) == 1]
    if len(counted) < 3:
        return False
    first, last = counted[0], counted[-1]
    assert first.window is not None
    assert last.window is not None
    advance = last.window.scheduler_steps[0] - first.window.scheduler_steps[0]
    return 0.5 <= advance / max(1, last.step - first.step) <= 1.5


def _found(
    one: SchedulerFacts,
    records: tuple[StepRecord, ...],
    planned: int,
    steps: int,
    what: str,
    severity: Severity,
) -> Finding:
    return RULE.finding(
        f"{one.kind} runs its course in {planned} steps, and {steps} {what}: the learning rate will not come "
        "down as intended",
        place=one.kind,
        first_step=records[0].step,
        last_step=records[-1].step,
        evidence={"planned_steps": planned, "steps": steps},
        severity=severity,
    )


def _annealed(planned: int) -> RunLog:
    one = SchedulerFacts(kind="CosineAnnealingLR", optimizer="optimizer", planned_steps=planned)
    records = [step(i, window={"scheduler_steps": (i,)}) for i in range(8)]
    return run(records, setup(schedulers=(one,), plan=Plan(steps=8)), RunEnd(step=8))


def fires_on() -> RunLog:
    """A cosine over 1,000 steps in a run of 8."""
    return _annealed(1000)


def silent_on() -> RunLog:
    """A cosine over the 8 steps of the run and a few more."""
    return _annealed(10)

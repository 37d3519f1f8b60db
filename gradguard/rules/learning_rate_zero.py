"""A parameter group whose learning rate is 0, or 0 for all that matters.

Looks at: the learning rate of every group at every step. Limits: the first steps of a warm-up from zero and
the end of a schedule that went down to zero are healthy, so the rate must be 0 several steps in a row, and
not have come down smoothly.

Sources: https://docs.pytorch.org/docs/stable/optim.html.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG305",
    slug="learning-rate-zero",
    family="optimizer",
    severity=Severity.ERROR,
    summary="The learning rate of a parameter group is zero.",
    remedy="Set the group's lr, and look at the schedule's factor at this step.",
    needs=(Sight.STEPS,),
    explains=("GG306",),
)


def check(run: Evidence, *, steps: int = 3, nothing: float = 1e-15) -> Iterator[Finding]:
    """Report groups whose rate is zero several steps in a row without having decayed to it."""
    for name, records in run.by_optimizer.items():
        width = max((len(r.learning_rates) for r in records), default=0)
        for group in range(width):
            first = _zero_since(records, group, steps=steps, nothing=nothing)
            if first is not None:
                yield RULE.finding(
                    f"the learning rate of group {group} of {name!r} has been 0 since step {first}: its "
                    "parameters cannot move",
                    place=f"group {group}",
                    first_step=first,
                    last_step=records[-1].step,
                    evidence={"learning_rate": records[-1].learning_rates[group], "group": group},
                )


def _zero_since(
    records: tuple[StepRecord, ...], group: int, *, steps: int, nothing: float
) -> int | None:
    """Return the first step of a row of zero rates that was not come to by a decay."""
    row, largest, last = 0, 0.0, 0.0
    for index, record in enumerate(records):
        rate = record.learning_rates[group] if group < len(record.learning_rates) else 1.0
        largest = max(largest, rate)
        if rate > nothing:
            row, last = 0, rate
            continue
        row += 1
        if row == steps and last >= 0.5 * largest:
            return records[index - steps + 1].step
    return None


def fires_on() -> RunLog:
    """Group 1 was never given a rate."""
    return run([step(i, learning_rates=(1e-3, 0.0)) for i in range(5)], setup())


def silent_on() -> RunLog:
    """Warm-up from zero, then a cosine that ends at zero."""
    rates = [0.0, 5e-4, 1e-3, 5e-4, 1e-4, 1e-5, 0.0, 0.0, 0.0, 0.0]
    return run([step(i, learning_rates=(rate,)) for i, rate in enumerate(rates)], setup())

"""Batches that are loaded and never reach a backward pass.

Looks at: batches drawn from guard.batches(loader) for every step, and its micro-steps. Limits: a loop that
uses several batches for one loss (pairs, episodes) on purpose looks the same; do not count those loaders.

Sources: a published training loop took one step per epoch because backward and step stood outside of the
loop.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG709",
    slug="batches-not-trained",
    family="gradient handling",
    severity=Severity.ERROR,
    summary="Most batches are loaded and never trained on.",
    remedy="Move backward() and step() into the loop over the batches.",
    needs=(Sight.STEPS,),
)


def check(run: Evidence, *, times: float = 2.0) -> Iterator[Finding]:
    """Report optimizers that draw several batches for every backward pass."""
    for name, records in run.by_optimizer.items():
        counted = [(r, r.batches, r.micro_steps) for r in records if r.batches and r.micro_steps]
        wasted = [row for row in counted if row[1] >= times * row[2]]
        if wasted and len(wasted) > len(counted) / 2:
            record, batches, passes = wasted[0]
            yield RULE.finding(
                f"step {record.step} of {name!r} was taken on {passes} backward pass(es) for {batches} batches "
                "loaded: the others were thrown away",
                place=name,
                first_step=record.step,
                last_step=wasted[-1][0].step,
                evidence={"batches": batches, "micro_steps": passes},
            )


def fires_on() -> RunLog:
    """One step per epoch of eight batches."""
    return run([step(i, batches=8) for i in range(4)], setup())


def silent_on() -> RunLog:
    """Four batches accumulate in four micro-steps."""
    return run([step(i, batches=4, micro_steps=4) for i in range(4)], setup())

"""Backward passes that no optimizer step ever follows.

Looks at: the backward passes since the last attempted step when watching ends. Limits: known only at the end
of the run.

Sources: https://docs.pytorch.org/docs/stable/optim.html (taking an optimization step).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import RunEnd
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG703",
    slug="step-not-called",
    family="gradient handling",
    severity=Severity.ERROR,
    summary="optimizer.step() is never, or hardly ever, called.",
    remedy="Call optimizer.step() after backward(), inside the loop.",
    needs=(Sight.END,),
)


def check(run: Evidence, *, passes: int = 3, times: float = 4.0) -> Iterator[Finding]:
    """Report a run that ends with many more backward passes than its steps usually had."""
    end = run.end
    if end is None or not end.clean:
        return
    usual = max((r.micro_steps or 0 for r in run.steps), default=0)
    if end.micro_steps >= max(passes, times * usual):
        yield RULE.finding(
            f"{end.micro_steps} backward passes have been made since the last of {len(run.steps)} attempted "
            "optimizer steps, and the run is over",
            first_step=len(run.steps),
            evidence={"backward_passes": end.micro_steps, "steps": len(run.steps)},
        )


def fires_on() -> RunLog:
    """Twelve backward passes and no step."""
    return run([], setup(), RunEnd(step=0, micro_steps=12))


def silent_on() -> RunLog:
    """A run that ends in the middle of a window of accumulation."""
    steps = [step(i, micro_steps=4) for i in range(4)]
    return run(steps, setup(), RunEnd(step=4, micro_steps=3))

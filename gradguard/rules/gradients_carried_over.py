"""Gradients of earlier steps that are still there when a new window begins.

Looks at: a sample of gradient values before the first micro-step of every window. Accumulation happens within
a window and is not affected. Limits: the sample holds up to three parameters; keeping gradients after a
skipped or vetoed step may be meant, so only windows after a taken step count.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG701",
    slug="gradients-carried-over",
    family="gradient handling",
    severity=Severity.ERROR,
    summary="Gradients are not cleared between optimizer steps.",
    remedy="Call optimizer.zero_grad() after every optimizer.step() (or before every new window).",
    needs=(Sight.STEPS,),
    explains=(
        "GG307",
        "GG602",
    ),
)


def check(run: Evidence, *, steps: int = 2) -> Iterator[Finding]:
    """Report optimizers that begin windows on old gradients, several times in a row."""
    for name, records in run.by_optimizer.items():
        row: list[StepRecord] = []
        for before, record in pairwise(records):
            carried = record.window.carried_norm if record.window else None
            if carried is None or before.outcome is not StepOutcome.APPLIED:
                continue
            row = [*row, record] if carried > 0 else []
            if len(row) == steps:
                break
        if len(row) >= steps:
            carried = row[0].window.carried_norm if row[0].window else None
            yield RULE.finding(
                f"gradients of {name!r} from before step {row[0].step} are still there when its first "
                "backward pass begins: zero_grad() is missing",
                place=name,
                first_step=row[0].step,
                last_step=row[-1].step,
                evidence={"carried_norm": carried or 0.0},
            )


def fires_on() -> RunLog:
    """zero_grad is never called."""
    window = {"carried_norm": 0.1, "fresh_micro_steps": 0}
    return run([step(i, window=window if i else {}) for i in range(5)], setup())


def silent_on() -> RunLog:
    """Four micro-steps accumulate, from zeros (set_to_none=False)."""
    return run([step(i, micro_steps=4, window={"carried_norm": 0.0}) for i in range(5)], setup())

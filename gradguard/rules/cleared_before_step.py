"""Gradients that were cleared between the backward pass and the step.

Looks at: steps without any gradient (or with zeros only) although backward passes brought one. Limits: the
sampled gradient must have been seen to be non-zero after the backward pass.

Sources: https://docs.pytorch.org/tutorials/recipes/recipes/zeroing_out_gradients.html.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._runs import healthy, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG702",
    slug="cleared-before-step",
    family="gradient handling",
    severity=Severity.ERROR,
    summary="Gradients are cleared between backward() and step().",
    remedy="Move zero_grad() to after step(), or to before the first backward pass of the window.",
    needs=(Sight.STEPS,),
    explains=(
        "GG501",
        "GG502",
        "GG306",
    ),
)


def check(run: Evidence, *, steps: int = 2) -> Iterator[Finding]:
    """Report optimizers whose gradients came and were gone at the step, several times."""
    for name, records in run.by_optimizer.items():
        lost = [record for record in records if _is_lost(record)]
        if len(lost) >= steps:
            window = lost[0].window
            yield RULE.finding(
                f"at {len(lost)} steps of {name!r}, the first of them step {lost[0].step}, backward passes "
                "had brought gradients and none was left",
                place=name,
                first_step=lost[0].step,
                last_step=lost[-1].step,
                evidence={
                    "steps": len(lost),
                    "backward_norm": (window and window.backward_norm) or 0.0,
                },
            )


def _is_lost(record: StepRecord) -> bool:
    window = record.window
    brought = window is not None and (window.backward_norm or 0.0) > 0
    if not brought or window is None:
        return False
    gone = record.outcome is StepOutcome.NO_GRADIENT or record.gradient_norm == 0.0
    return gone and record.outcome is not StepOutcome.VETOED


def fires_on() -> RunLog:
    """zero_grad stands between backward and step."""
    gone = {"outcome": StepOutcome.NO_GRADIENT, "gradient_norm": None, "drift": None, "groups": ()}
    return run([step(i, window={"step_norm": None}, **gone) for i in range(5)], setup())


def silent_on() -> RunLog:
    """Gradients arrive and are used."""
    return healthy()

"""Clipping that was declared and does not bound the gradients of the step.

Looks at: the gradient norm every step was taken with, beside the declared threshold. Clipping after the step,
before the backward pass, of a copy or of other parameters leaves it larger. Limits: judged only with a
declared plan; a run whose gradients stay below the threshold says nothing; a threshold per group lets the
whole exceed it.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import Plan
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG705",
    slug="clip-ineffective",
    family="gradient handling",
    severity=Severity.ERROR,
    summary="The declared clipping does not reach the gradients of the step.",
    remedy="Call clip_grad_norm_ on all parameters of the optimizer after the last backward pass (and after "
    "scaler.unscale_) and before optimizer.step().",
    needs=(Sight.STEPS, Sight.PLAN),
)


def check(run: Evidence, *, steps: int = 3, slack: float = 1.01) -> Iterator[Finding]:
    """Report optimizers that took several steps with more than the declared norm."""
    limit = run.plan.max_gradient_norm
    if limit is None or not limit > 0:
        return
    for name, records in run.by_optimizer.items():
        over = [r for r in records if _exceeds(r, slack * limit)]
        if len(over) >= steps:
            norm = over[0].gradient_norm or 0.0
            yield RULE.finding(
                f"{len(over)} of {len(records)} steps of {name!r}, the first of them step {over[0].step}, were "
                f"taken with a gradient norm above the declared {limit:g} ({norm:.4g} there)",
                place=name,
                first_step=over[0].step,
                last_step=over[-1].step,
                evidence={"gradient_norm": norm, "limit": limit, "steps": len(over)},
            )


def _exceeds(record: StepRecord, limit: float) -> bool:
    norm = record.gradient_norm
    taken = record.outcome in (StepOutcome.APPLIED, StepOutcome.NO_MOTION)
    return taken and norm is not None and math.isfinite(norm) and norm > limit


def fires_on() -> RunLog:
    """Clipping to 0.1 comes after the step."""
    return run([step(i) for i in range(5)], setup(plan=Plan(max_gradient_norm=0.1)))


def silent_on() -> RunLog:
    """Clipping to 0.5 is active at every step; the norm ends a rounding above it."""
    records = [
        step(i, gradient_norm=0.5000001, gradient_norm_before_clipping=3.0) for i in range(5)
    ]
    return run(records, setup(plan=Plan(max_gradient_norm=0.5)))

"""A step that wrote NaN or Inf into the parameters.

Looks at: the outcome CORRUPTED. With finite gradients the optimizer's own arithmetic did it: an eps of 0 in
the precision of the parameters, an overflowing second moment, an infinite learning rate. Limits: what the
gradients were before the step is known for the whole only.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html (eps).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._runs import healthy, run, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG604",
    slug="nonfinite-update",
    family="numerics",
    severity=Severity.ERROR,
    summary="The optimizer wrote NaN or Inf into the parameters.",
    remedy="Raise eps (1e-8 is 0 in float16), keep float32 weights, look at the learning rate; restore the "
    "last good checkpoint.",
    needs=(Sight.STEPS,),
    explains_later=("GG601", "GG602"),
)


def check(run: Evidence) -> Iterator[Finding]:
    """Report the first corrupted step of every optimizer."""
    for name, records in run.by_optimizer.items():
        bad = [r for r in records if r.outcome is StepOutcome.CORRUPTED]
        if bad:
            first = bad[0]
            finite = first.nonfinite_tensors == 0
            how = (
                "on finite gradients"
                if finite
                else f"on gradients that were not finite in {first.first_nonfinite}"
            )
            yield RULE.finding(
                f"step {first.step} of {name!r} wrote NaN or Inf into the parameters, {how}",
                place=first.first_nonfinite or name,
                first_step=first.step,
                last_step=bad[-1].step,
                evidence={"gradient_norm": _norm(first), "steps": len(bad)},
            )


def _norm(record: StepRecord) -> float:
    return math.nan if record.gradient_norm is None else record.gradient_norm


def fires_on() -> RunLog:
    """eps is 0 in float16."""
    return run(
        [
            step(i, outcome=StepOutcome.CORRUPTED if i == 2 else StepOutcome.APPLIED)
            for i in range(3)
        ]
    )


def silent_on() -> RunLog:
    """Every step is taken."""
    return healthy()

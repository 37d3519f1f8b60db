"""NaN or Inf in a gradient although the loss is finite.

Looks at: the gradients of every attempt without a loss scaler. Limits: with a loss scaler a single overflow
cannot be told from a fault; GG101 looks at rows of them.

Sources: https://docs.pytorch.org/docs/stable/autograd.html#anomaly-detection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._probes import birth_of, where
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG601",
    slug="nonfinite-gradient",
    family="numerics",
    severity=Severity.ERROR,
    summary="The derivative of an operation is NaN or infinite at this point.",
    remedy="Look with gg.locate_nonfinite for the operation (sqrt or norm at 0, log, division, where over "
    "both branches) and keep its input away from there.",
    needs=(Sight.STEPS,),
    explains=("GG604",),
    explains_later=("GG602",),
    asks=True,
)


def check(run: Evidence) -> Iterator[Finding]:
    """Report the first non-finite gradient of every optimizer without a loss scaler."""
    for name, records in run.by_optimizer.items():
        bad = [r for r in records if r.nonfinite_tensors and _is_own(r)]
        if bad:
            first = bad[0]
            vetoed = len(bad) == 1 and first.outcome is StepOutcome.VETOED
            yield RULE.finding(
                f"at step {first.step} the gradient of {first.first_nonfinite} is not finite although "
                "the loss is "
                f"({first.nonfinite_tensors} tensors in all; {len(bad)} of {len(records)} steps of {name!r})"
                f"{where(birth_of(run))}",
                place=first.first_nonfinite,
                first_step=first.step,
                last_step=bad[-1].step,
                evidence={"tensors": first.nonfinite_tensors or 0, "steps": len(bad)},
                severity=Severity.WARNING if vetoed else None,
            )


def _is_own(record: StepRecord) -> bool:
    """Whether the loss was finite, and no loss scale can have caused an overflow."""
    finite = record.loss is None or math.isfinite(record.loss)
    return finite and record.loss_scale_before is None


def fires_on() -> RunLog:
    """NaN in one tensor from step 2 on, without a scaler."""
    bad = {"gradient_norm": math.nan, "nonfinite_tensors": 1, "first_nonfinite": "first.weight"}
    return run([step(i, **(bad if i >= 2 else {})) for i in range(5)], setup())


def silent_on() -> RunLog:
    """The first overflow of a large loss scale."""
    bad = {
        "outcome": StepOutcome.SKIPPED_BY_SCALER,
        "nonfinite_tensors": 4,
        "gradient_norm": math.inf,
    }
    first = step(0, loss_scale_before=2.0**24, **bad)
    return run(
        [first, *(step(i, loss_scale_before=2.0**23) for i in range(1, 5))], setup(scaler=True)
    )

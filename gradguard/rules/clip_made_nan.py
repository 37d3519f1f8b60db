"""Norm clipping that spread one non-finite gradient over all others.

Looks at: a sample of gradient values that was finite after the backward pass, and is NaN (or exactly zero) at a
step on gradients that are not finite. A total norm of NaN makes every clipped gradient NaN; one of Inf zeroes
all that were finite. Steps that a scaler skipped or a gate vetoed did no harm. Limits: the sample holds up to
three parameters; an Inf among these themselves is GG601's; a hook or a reduction that breaks gradients after
the backward pass looks the same.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html
(error_if_nonfinite).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG606",
    slug="clip-made-nan",
    family="numerics",
    severity=Severity.ERROR,
    summary="Clipping by a norm that is not finite broke gradients that were finite.",
    remedy="Pass error_if_nonfinite=True to clip_grad_norm_, or skip the step when the norm it returns is not "
    "finite; then find the one bad gradient with gg.locate_nonfinite.",
    needs=(Sight.STEPS,),
    explains=("GG601", "GG604"),
)

_HARMLESS = (StepOutcome.SKIPPED_BY_SCALER, StepOutcome.VETOED)


def check(run: Evidence) -> Iterator[Finding]:
    """Report optimizers that stepped on gradients which broke after the backward pass."""
    for name, records in run.by_optimizer.items():
        broken = [record for record in records if record.nonfinite_tensors and _is_spread(record)]
        if broken:
            first = broken[0]
            yield RULE.finding(
                f"at step {first.step} gradients of {name!r} that were finite after the backward pass had been "
                f"overwritten at the step, where {first.nonfinite_tensors} gradient(s) were not finite: "
                "clipping spread one bad gradient over the others",
                # Of several, the first one is no more to blame than the others.
                place=first.first_nonfinite if first.nonfinite_tensors == 1 else name,
                first_step=first.step,
                last_step=broken[-1].step,
                evidence={"tensors": first.nonfinite_tensors or 0, "steps": len(broken)},
            )


def _is_spread(record: StepRecord) -> bool:
    window = record.window
    if window is None or window.backward_nonfinite is not False or record.outcome in _HARMLESS:
        return False
    before, after = window.backward_norm, window.step_norm
    if before is None or after is None or not math.isfinite(before) or before <= 0:
        return False
    return not math.isfinite(after) or after == 0.0


def fires_on() -> RunLog:
    """One parameter's NaN makes the total norm NaN, and with it every gradient."""
    bad = {
        "gradient_norm": math.nan,
        "nonfinite_tensors": 4,
        "first_nonfinite": "first.weight",
        "window": {"backward_norm": 0.1, "step_norm": math.nan},
    }
    return run([step(i, **(bad if i == 2 else {})) for i in range(4)], setup())


def silent_on() -> RunLog:
    """Clipping takes nine tenths of finite gradients."""
    clipped = {"backward_norm": 1.0, "step_norm": 0.1}
    return run([step(i, window=clipped) for i in range(6)], setup())

"""NaN or Inf in gradients that were made finite before the step, without a loss scaler.

Looks at: a sample of gradient values right after every backward pass, and again at the step. Limits: the
sample holds up to three parameters. With a loss scaler see GG106.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nan_to_num.html.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import healthy, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG605",
    slug="nonfinite-masked",
    family="numerics",
    severity=Severity.ERROR,
    summary="Non-finite gradients are written over, which hides a real failure.",
    remedy="Count them instead (gg.sanitize_gradients_), and find the operation with gg.locate_nonfinite.",
    needs=(Sight.STEPS,),
    explains=(
        "GG502",
        "GG306",
    ),
)


def check(run: Evidence, *, steps: int = 1) -> Iterator[Finding]:
    """Report steps on gradients that were not finite after the backward pass and are finite now."""
    for name, records in run.by_optimizer.items():
        hidden = [r for r in records if _is_hidden(r)]
        if len(hidden) >= max(1, steps):
            yield RULE.finding(
                f"at {len(hidden)} of {len(records)} steps of {name!r}, the first of them step "
                f"{hidden[0].step}, gradients held NaN or Inf after the backward pass and were finite "
                "at the step",
                place=name,
                first_step=hidden[0].step,
                last_step=hidden[-1].step,
                evidence={"steps": len(hidden)},
            )


def _is_hidden(record: StepRecord) -> bool:
    window = record.window
    if window is None or not window.backward_nonfinite or record.loss_scale_before is not None:
        return False
    return record.nonfinite_tensors == 0 and window.step_norm is not None


def fires_on() -> RunLog:
    """nan_to_num on every gradient."""
    return run([step(i, window={"backward_nonfinite": True}) for i in range(4)], setup())


def silent_on() -> RunLog:
    """Gradients are finite all the way."""
    return healthy()

"""Overflowed gradients that were made finite before the loss scaler could see them.

Looks at: a sample of gradient values right after every backward pass, and again at the step. NaN or Inf after
the backward and a finite gradient at the step mean that something wrote over them. The scaler then never
backs off, every later step overflows too, and the model stands still while steps are "taken". Limits: the
sample holds up to three parameters; an overflow elsewhere is not seen.

Sources: https://docs.pytorch.org/docs/stable/amp.html (found_inf is set by NaN as well as by Inf).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG106",
    slug="overflow-hidden",
    family="amp",
    severity=Severity.ERROR,
    summary="Gradients that overflowed are written over before the loss scaler sees them.",
    remedy="Remove nan_to_num (or zeroing of NaN) before scaler.unscale_: the scaler must see NaN and Inf to "
    "skip the step and lower its scale. Count them with gg.sanitize_gradients_(policy='report').",
    needs=(Sight.STEPS, Sight.SCALER),
    explains=("GG306", "GG502", "GG604"),
)


def check(run: Evidence, *, steps: int = 1) -> Iterator[Finding]:
    """Report steps that were taken on gradients that were not finite after the backward pass."""
    for records in run.by_optimizer.values():
        hidden = [record for record in records if _is_hidden(record)]
        if len(hidden) >= max(1, steps):
            scale = hidden[0].loss_scale_before or 0.0
            yield RULE.finding(
                f"{len(hidden)} of {len(records)} steps, the first of them step {hidden[0].step}, were taken "
                "on gradients that held NaN or Inf after the backward pass and were finite at the step: "
                f"the loss scaler never saw the overflow, and its scale stays at {scale:g}",
                first_step=hidden[0].step,
                last_step=hidden[-1].step,
                evidence={"steps": len(hidden), "loss_scale": scale},
            )


def _is_hidden(record: StepRecord) -> bool:
    window = record.window
    if window is None or not window.backward_nonfinite or record.found_inf != 0:
        return False
    return record.outcome is not StepOutcome.SKIPPED_BY_SCALER and record.nonfinite_tensors == 0


def fires_on() -> RunLog:
    """Every backward pass overflows at 2**24, and every step is taken."""
    changes = {
        "loss_scale_before": 2.0**24,
        "found_inf": 0.0,
        "window": {"backward_nonfinite": True},
    }
    return run([step(i, **changes) for i in range(6)], setup(scaler=True))


def silent_on() -> RunLog:
    """The scaler sees the overflow and skips the step."""
    skipped = {"outcome": StepOutcome.SKIPPED_BY_SCALER, "found_inf": 1.0, "nonfinite_tensors": 4}
    first = step(0, loss_scale_before=2.0**16, window={"backward_nonfinite": True}, **skipped)
    later = [step(i, loss_scale_before=2.0**15, found_inf=0.0) for i in range(1, 6)]
    return run([first, *later], setup(scaler=True))

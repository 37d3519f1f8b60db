"""Gradients that were clipped while they still bore the loss scale.

Looks at: the gradient norm of every taken step times its loss scale. Clipping scaled gradients to a threshold
leaves a norm of threshold / scale: the product is the same at every step, to the last digits. The effective
learning rate is then divided by the loss scale. Limits: thresholds above 1,000, gradients that are always
below the threshold, and optimizers whose group does not hold everything that was clipped, are not seen.

Sources: https://docs.pytorch.org/docs/stable/notes/amp_examples.html (gradient clipping).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG102",
    slug="clipped-before-unscaling",
    family="amp",
    severity=Severity.ERROR,
    summary="Gradients are clipped before they are unscaled.",
    remedy="Call scaler.unscale_(optimizer) before clip_grad_norm_.",
    needs=(Sight.STEPS, Sight.SCALER),
    explains=(
        "GG306",
        "GG704",
    ),
)


def check(
    run: Evidence,
    *,
    steps: int = 3,
    tolerance: float = 1e-3,
    most: float = 1e3,
    small: float = 0.02,
) -> Iterator[Finding]:
    """Report rows of steps whose scaled gradient norm does not change, at the size of a threshold."""
    for records in run.by_optimizer.values():
        first, count, level = -1, 0, 0.0
        for record in records:
            scale, norm = record.loss_scale_before, record.gradient_norm
            if record.outcome is not StepOutcome.APPLIED or not scale or not norm:
                continue
            product = norm * scale
            # Clipping after unscaling leaves a constant norm as well, but not a tiny one.
            if not (norm < small and product < most):
                first, count, level = -1, 0, 0.0
            elif not abs(product - level) <= tolerance * level:
                first, count, level = record.step, 1, product
            else:
                count += 1
            if count == steps:
                yield RULE.finding(
                    f"the gradient norm times the loss scale has been {level:.4g} at every step since "
                    f"step {first}: gradients are clipped to that before they are unscaled, and the "
                    f"learning rate is in effect divided by {scale:g}",
                    first_step=first,
                    last_step=record.step,
                    evidence={"clipped_to": level, "loss_scale": scale, "gradient_norm": norm},
                )
                break


def fires_on() -> RunLog:
    """A threshold of 1, and a loss scale of 65536 that nobody divided by."""
    scaled = {"loss_scale_before": 65536.0, "loss_scale_after": 65536.0}
    return run([step(i, gradient_norm=1 / 65536, **scaled) for i in range(6)], setup(scaler=True))


def silent_on() -> RunLog:
    """Clipping to 1 is active at every step, after unscaling."""
    scales = [65536.0] * 6
    records = [step(i, gradient_norm=1.0, loss_scale_before=s) for i, s in enumerate(scales)]
    return run(records, setup(scaler=True))

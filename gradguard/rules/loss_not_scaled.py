"""A loss scaler that divides gradients by a scale which the loss was never multiplied with.

Looks at: the derivative of what was differentiated with respect to the observed loss, with the loss scale
divided out: 1 for a scaled loss (1/n for one of n micro-batches). A loss that was not passed through
``scaler.scale`` leaves 1 / loss scale, and the optimizer then works with gradients that are that much too
small. Limits: known only when the loss is observed before its backward pass; scales below ``least_scale``
are not judged, because a weight as small as that may be meant.

Sources: https://docs.pytorch.org/docs/stable/notes/amp_examples.html (typical mixed precision training).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG104",
    slug="loss-not-scaled",
    family="amp",
    severity=Severity.ERROR,
    summary="The loss is differentiated without the loss scale that the scaler divides out.",
    remedy="Call scaler.scale(loss).backward() instead of loss.backward().",
    needs=(Sight.STEPS, Sight.SCALER, Sight.LOSS_WEIGHT),
    explains=("GG306",),
)


def check(
    run: Evidence, *, steps: int = 2, least_scale: float = 1000.0, tolerance: float = 0.01
) -> Iterator[Finding]:
    """Report optimizers whose loss weight is at most 1 / loss scale at several steps."""
    for name, records in run.by_optimizer.items():
        wrong = [r for r in records if _is_unscaled(r, least_scale, 1.0 + tolerance)]
        if len(wrong) < steps:
            continue
        first = wrong[0]
        scale, weight = first.loss_scale_before or 0.0, _weight(first)
        yield RULE.finding(
            f"since step {first.step} the loss of {name!r} is differentiated without the loss scale of "
            f"{scale:g}, which the scaler divides out all the same: its gradient counts {weight:.3g} times",
            place=name,
            first_step=first.step,
            last_step=wrong[-1].step,
            evidence={"loss_weight": weight, "loss_scale": scale, "steps": len(wrong)},
        )


def _weight(record: StepRecord) -> float:
    weight = record.window.loss_weight if record.window is not None else None
    return 0.0 if weight is None else weight


def _is_unscaled(record: StepRecord, least_scale: float, limit: float) -> bool:
    scale = record.loss_scale_before
    # A NaN in either fails its comparison.
    return (
        scale is not None and scale >= least_scale and 0.0 < abs(_weight(record)) * scale <= limit
    )


def fires_on() -> RunLog:
    """loss.backward() beside a scaler at 65536."""
    weight = {"loss_weight": 1 / 65536}
    return run(
        [step(i, loss_scale_before=65536.0, window=weight) for i in range(5)], setup(scaler=True)
    )


def silent_on() -> RunLog:
    """Sixty-four micro-batches, each of them scaled."""
    weight = {"loss_weight": 1 / 64}
    return run(
        [step(i, loss_scale_before=65536.0, window=weight) for i in range(5)], setup(scaler=True)
    )

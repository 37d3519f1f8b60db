"""Optimizer steps that the loss scaler skipped, one after the other.

Looks at: rows of steps with outcome SKIPPED_BY_SCALER. A scale that is finding its level skips a few steps
while it halves, and then steps are taken: that is healthy, and this rule is silent about it as long as the
scale is large. A scale that has already fallen to ``small_scale`` and still overflows will not be cured by
falling further: the gradient itself is NaN or infinite. Limits: a scale that starts very low hides how long
it has been falling.

Sources: https://docs.pytorch.org/docs/stable/amp.html (gradient scaling); issues 99640 and 67590 of PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG101",
    slug="skipped-step-streak",
    family="amp",
    severity=Severity.ERROR,
    summary="The loss scaler skips (nearly) every optimizer step.",
    remedy="Find the operation that makes NaN or Inf (gg.locate_nonfinite); a smaller loss scale will not "
    "help.",
    needs=(Sight.STEPS, Sight.SCALER),
    explains=("GG103",),
)


def check(
    run: Evidence, *, limit: int = 20, small_scale: float = 16.0, small_limit: int = 3
) -> Iterator[Finding]:
    """Report rows of skipped steps that are longer than a settling scale needs."""
    for records in run.by_optimizer.values():
        for streak in _streaks(records):
            small = [r for r in streak if (r.loss_scale_before or 0.0) <= small_scale]
            if len(streak) < limit and len(small) < small_limit:
                continue
            scale = streak[-1].loss_scale_before
            place = streak[-1].first_nonfinite
            where = f", the first of them in {place}" if place else ""
            yield RULE.finding(
                f"{len(streak)} optimizer steps in a row were skipped since step {streak[0].step}: the "
                f"gradient is still not finite at a loss scale of {scale:g}{where}",
                place=place,
                first_step=streak[0].step,
                last_step=streak[-1].step,
                evidence={"skipped": len(streak), "loss_scale": scale or 0.0},
            )


def _streaks(records: tuple[StepRecord, ...]) -> Iterator[list[StepRecord]]:
    streak: list[StepRecord] = []
    for record in records:
        if record.outcome is StepOutcome.SKIPPED_BY_SCALER:
            streak.append(record)
        elif streak:
            yield streak
            streak = []
    if streak:
        yield streak


def _skipped(number: int, scale: float) -> StepRecord:
    return step(
        number,
        outcome=StepOutcome.SKIPPED_BY_SCALER,
        loss_scale_before=scale,
        loss_scale_after=scale / 2,
        drift=None,
        gradient_norm=float("nan"),
        nonfinite_tensors=1,
        first_nonfinite="first.weight",
    )


def fires_on() -> RunLog:
    """A gradient that is NaN however small the loss scale is."""
    return run([_skipped(i, 2.0 ** (16 - i)) for i in range(24)], setup(scaler=True))


def silent_on() -> RunLog:
    """The scale settles from 2**24 at the start of a run."""
    settling = [_skipped(i, 2.0 ** (24 - i)) for i in range(9)]
    taken = [step(i, loss_scale_before=2.0**15, loss_scale_after=2.0**15) for i in range(9, 20)]
    return run(settling + taken, setup(scaler=True))

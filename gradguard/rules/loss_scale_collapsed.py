"""A loss scale that has fallen so far that it shrinks the gradient.

Looks at: the loss scale of every attempt. A scale is there to enlarge gradients; below 1 it makes them smaller,
and below the smallest normal float32 number dividing by it is no longer exact or gives infinity. Every overflow
halves the scale, so that a scale this small is the trace of overflows that no scale can cure. Limits: what
overflows is not said here, and a scale that was set below 1 by hand looks the same.

Sources: https://docs.pytorch.org/docs/stable/amp.html (gradient scaling).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG103",
    slug="loss-scale-collapsed",
    family="amp",
    severity=Severity.WARNING,
    summary="The loss scale has fallen below 1 and now makes gradients smaller.",
    remedy="Find the operation that overflows at every scale (gg.locate_nonfinite), and start again from the "
    "last good checkpoint with a new GradScaler.",
    needs=(Sight.STEPS, Sight.SCALER),
)

_SMALLEST_NORMAL = 2.0**-126


def check(run: Evidence, *, least: float = 1.0) -> Iterator[Finding]:
    """Report the first attempt of every optimizer with a scale below ``least``."""
    for name, records in run.by_optimizer.items():
        low = [r for r in records if _scale(r) < least]
        if not low:
            continue
        smallest = min(_scale(r) for r in low)
        ruined = smallest < _SMALLEST_NORMAL
        effect = "no float32 gradient survives it" if ruined else "it shrinks gradients"
        yield RULE.finding(
            f"the loss scale of {name!r} is {_scale(low[0]):g} at step {low[0].step} and has been as low as "
            f"{smallest:g}: {effect}",
            place=name,
            first_step=low[0].step,
            last_step=low[-1].step,
            evidence={"loss_scale": smallest, "steps": len(low)},
            severity=Severity.ERROR if ruined else None,
        )


def _scale(record: StepRecord) -> float:
    """Return the loss scale, infinite where there is none: then nothing is too small."""
    scale = record.loss_scale_before
    return float("inf") if scale is None or math.isnan(scale) else scale


def fires_on() -> RunLog:
    """Steps are taken at a scale of one eighth."""
    return run([step(i, loss_scale_before=0.125) for i in range(5)], setup(scaler=True))


def silent_on() -> RunLog:
    """A scale of exactly 1, which is what a scaler for bfloat16 may be set to."""
    return run([step(i, loss_scale_before=1.0) for i in range(5)], setup(scaler=True))

"""Gradients that grow by orders of magnitude through depth, or from step to step.

Looks at: two things. On detailed steps, the root mean square gradient of every weight matrix in the order of
the parameters: the first is 100,000 times the last one and those between them follow. Over steps: the global
gradient norm, 10,000 times the largest of the first three, while the loss is not below where it began.
Clipping that is active bounds the norm of the step, so that the second is silent. Limits: the second needs the
observed loss; the order of the parameters stands for depth.

Sources: https://proceedings.mlr.press/v28/pascanu13.html.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._depth import slopes
from gradguard.rules._runs import healthy, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG608",
    slug="exploding-gradients",
    family="numerics",
    severity=Severity.WARNING,
    summary="Gradients grow by orders of magnitude.",
    remedy="Clip the global gradient norm, lower the learning rate, and scale the initial weights so that "
    "every layer keeps the variance of its input.",
    needs=(Sight.STEPS, Sight.SETUP),
    explains_later=("GG601", "GG602"),
)


def check(
    run: Evidence,
    *,
    growth: float = 1e4,
    ratio: float = 1e5,
    readings: int = 2,
    matrices: int = 4,
    steps: int = 2,
) -> Iterator[Finding]:
    """Report growth over several steps in a row, and else growth through depth."""
    grown = False
    for name, records in run.by_optimizer.items():
        for finding in _over_steps(name, records, growth, steps):
            grown = True
            yield finding
    steep = [] if grown else [s for s in slopes(run, matrices=matrices) if s.ratio > ratio]
    if steep and len(steep) >= readings:
        first = steep[0]
        yield RULE.finding(
            f"at step {first.step} the gradient of {first.first_name} is {first.ratio:.2g} times that of "
            f"{first.last_name} (root mean squares, {first.matrices} weight matrices)",
            place=first.first_name,
            first_step=first.step,
            last_step=steep[-1].step,
            evidence={"ratio": first.ratio, "readings": len(steep)},
        )


def _over_steps(
    name: str, records: tuple[StepRecord, ...], growth: float, steps: int
) -> Iterator[Finding]:
    start, start_loss, seen, row = 0.0, math.nan, 0, 0
    for record in records:
        norm, loss = record.gradient_norm, record.loss
        if norm is None or loss is None or not math.isfinite(norm) or not math.isfinite(loss):
            continue
        if seen < 3:
            start, seen = max(start, norm), seen + 1
            start_loss = loss if seen == 1 else start_loss
            continue
        row = row + 1 if 0 < start * growth < norm and loss >= start_loss else 0
        if row == steps:
            yield RULE.finding(
                f"the gradient norm of {name!r} has gone from {start:.3g} to {norm:.3g} and the loss from "
                f"{start_loss:.4g} to {loss:.4g} by step {record.step}",
                place=name,
                first_step=record.step - steps + 1,
                last_step=record.step,
                evidence={"gradient_norm": norm, "first_gradient_norm": start, "loss": loss},
            )
            return


def fires_on() -> RunLog:
    """The gradient norm grows tenfold a step while the loss stays where it began."""
    return run([step(i, loss=1.0, gradient_norm=0.5 * 10.0**i) for i in range(12)], setup())


def silent_on() -> RunLog:
    """The same growth before clipping; the step is bounded."""
    return healthy(12, gradient_norm=1.0, gradient_norm_before_clipping=1e6)

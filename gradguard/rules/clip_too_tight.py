"""Norm clipping that takes away nearly all of every gradient.

Looks at: a sample of gradient values after the backward pass and at the step: less than a hundredth is left,
step after step. Limits: an optimizer that is blind to scale (Adam) still moves; with plain SGD nothing is
left to move with.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html.
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
    code="GG704",
    slug="clip-too-tight",
    family="gradient handling",
    severity=Severity.WARNING,
    summary="The clipping threshold takes away nearly all of every gradient.",
    remedy="Set max_norm near the usual gradient norm (look at it in the records), not far below it.",
    needs=(Sight.STEPS,),
    explains=("GG306",),
)


def check(run: Evidence, *, steps: int = 3, left: float = 0.01) -> Iterator[Finding]:
    """Report optimizers whose gradients shrink to almost nothing, several steps in a row."""
    for name, records in run.by_optimizer.items():
        row: list[tuple[int, float]] = []
        for record in records:
            share = _left(record)
            if share is None:
                continue
            row = [*row, (record.step, share)] if 0 < share < left else []
            if len(row) == steps:
                break
        if len(row) == steps:
            yield RULE.finding(
                f"only {row[0][1]:.2g} of the gradient of {name!r} is left at the step, since step {row[0][0]}",
                place=name,
                first_step=row[0][0],
                last_step=row[-1][0],
                evidence={"share_left": row[0][1]},
            )


def _left(record: StepRecord) -> float | None:
    window = record.window
    if window is None or not window.backward_norm or window.step_norm is None:
        return None
    share = window.step_norm / window.backward_norm
    return share if math.isfinite(share) else None


def fires_on() -> RunLog:
    """A threshold of one millionth."""
    tight = {"backward_norm": 1.0, "step_norm": 1e-6}
    return run([step(i, window=tight) for i in range(5)], setup())


def silent_on() -> RunLog:
    """Clipping is active and takes nine tenths."""
    return run(
        [step(i, window={"backward_norm": 1.0, "step_norm": 0.1}) for i in range(5)], setup()
    )

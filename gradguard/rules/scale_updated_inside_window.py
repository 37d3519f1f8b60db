"""A loss scale that is updated while gradients are still being accumulated.

Looks at: calls of ``scaler.update()`` per optimizer step of several micro-steps. When the scale changes between
two micro-steps, gradients of different scales are added up, and no later division can mend the sum. Limits:
optimizers that take turns under one scaler are not judged, since each sees the updates of the others.

Sources: https://docs.pytorch.org/docs/stable/notes/amp_examples.html (gradient accumulation).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG105",
    slug="scale-updated-inside-window",
    family="amp",
    severity=Severity.WARNING,
    summary="The loss scale is updated within an accumulation window.",
    remedy="Call scaler.step(optimizer) and scaler.update() once, after the last micro-step of the window.",
    needs=(Sight.STEPS, Sight.SCALER),
)


def check(run: Evidence, *, steps: int = 2) -> Iterator[Finding]:
    """Report a lone optimizer with several updates of the scale per step of several micro-steps."""
    if len(run.by_optimizer) != 1:
        return
    for name, records in run.by_optimizer.items():
        wrong = [r for r in records if (r.micro_steps or 0) > 1 and _updates(r) > 1]
        if len(wrong) >= steps:
            first = wrong[0]
            yield RULE.finding(
                f"the loss scale is updated {_updates(first)} times in the {first.micro_steps} micro-steps of "
                f"step {first.step} of {name!r}, and so at {len(wrong)} steps: gradients of different scales "
                "are added up",
                place=name,
                first_step=first.step,
                last_step=wrong[-1].step,
                evidence={
                    "scaler_updates": _updates(first),
                    "micro_steps": first.micro_steps or 0,
                    "steps": len(wrong),
                },
            )


def _updates(record: StepRecord) -> int:
    return 0 if record.window is None else record.window.scaler_updates or 0


def _accumulated(updates: int) -> RunLog:
    window = {"scaler_updates": updates, "forwards": 4, "forwards_reached": 4}
    records = [
        step(i, micro_steps=4, loss_scale_before=4096.0, window=window | {"loss_weight": 0.25})
        for i in range(5)
    ]
    return run(records, setup(scaler=True))


def fires_on() -> RunLog:
    """Four updates in windows of four micro-steps."""
    return _accumulated(4)


def silent_on() -> RunLog:
    """One update in windows of four micro-steps."""
    return _accumulated(1)

"""Micro-batches whose losses are added up and not averaged.

Looks at: the derivative of what was differentiated with respect to the observed loss, and the micro-steps of
the window: together they should make 1. Limits: known only when the loss is observed before its backward
pass, undivided.

Sources: https://docs.pytorch.org/docs/stable/notes/amp_examples.html (gradient accumulation).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG706",
    slug="accumulation-not-averaged",
    family="gradient handling",
    severity=Severity.WARNING,
    summary="Accumulated losses are added up instead of averaged: the gradient is too large by the number of "
    "micro-steps.",
    remedy="Divide the loss by the number of micro-steps before backward().",
    needs=(Sight.STEPS, Sight.LOSS_WEIGHT),
    explains=("GG307",),
)


def check(run: Evidence, *, steps: int = 2, excess: float = 1.5) -> Iterator[Finding]:
    """Report optimizers whose windows weigh the mean loss with much more than 1."""
    for name, records in run.by_optimizer.items():
        wrong = []
        for record in records:
            count, window = record.micro_steps, record.window
            if count is None or count < 2 or window is None or window.loss_weight is None:
                continue
            if abs(window.loss_weight) * count > excess and abs(window.loss_weight - 1.0) < 1e-3:
                wrong.append(record)
        if len(wrong) >= steps:
            micro_steps = wrong[0].micro_steps or 0
            yield RULE.finding(
                f"{micro_steps} micro-batches a step of {name!r} are differentiated with full weight since "
                f"step {wrong[0].step}: the gradient is {micro_steps} times that of their mean",
                place=name,
                first_step=wrong[0].step,
                last_step=wrong[-1].step,
                evidence={"micro_steps": micro_steps, "loss_weight": 1.0},
            )


def fires_on() -> RunLog:
    """Four micro-steps, each with full weight."""
    return run([step(i, micro_steps=4, window={"loss_weight": 1.0}) for i in range(5)], setup())


def silent_on() -> RunLog:
    """Four micro-steps with a quarter each."""
    return run([step(i, micro_steps=4, window={"loss_weight": 0.25}) for i in range(5)], setup())

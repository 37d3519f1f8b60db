"""Fused SGD with momentum whose first step the loss scaler skipped.

Looks at: the kind of optimizer and the outcome of its first attempt. torch makes the momentum buffers without
values and returns before it writes them; the next step uses whatever memory held. Limits: seen by the
circumstances, not by the values.

Sources: torch/optim/sgd.py (momentum buffers made with empty_like).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import GroupFacts
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG107",
    slug="fused-sgd-first-step-skipped",
    family="amp",
    severity=Severity.ERROR,
    summary="Fused SGD uses uninitialised momentum after its first step was skipped.",
    remedy="Use fused=False for SGD with momentum, or drop the momentum buffers from optimizer.state after "
    "a skipped first step.",
    needs=(Sight.STEPS, Sight.SCALER, Sight.SETUP),
    explains=(
        "GG602",
        "GG604",
        "GG307",
        "GG601",
    ),
)


def check(run: Evidence) -> Iterator[Finding]:
    """Report fused SGD with momentum whose first attempt was skipped."""
    for group in run.setup.groups if run.setup else ():
        momentum = group.settings.get("momentum", 0.0)
        if group.kind != "SGD" or not group.settings.get("fused") or not momentum:
            continue
        records = run.by_optimizer.get(group.optimizer, ())
        if records and records[0].outcome is StepOutcome.SKIPPED_BY_SCALER:
            yield RULE.finding(
                f"the first step of fused SGD {group.optimizer!r} was skipped: its momentum buffers hold "
                "uninitialised memory, and the next step uses them",
                place=f"group {group.index}",
                first_step=records[0].step,
                evidence={"momentum": momentum},
            )


def _sgd(*, fused: float) -> GroupFacts:
    settings = {"lr": 1e-3, "momentum": 0.9, "fused": fused}
    return GroupFacts(optimizer="optimizer", index=0, kind="SGD", parameters=4, settings=settings)


def _settling() -> list[StepRecord]:
    skipped = step(
        0, outcome=StepOutcome.SKIPPED_BY_SCALER, loss_scale_before=65536.0, found_inf=1.0
    )
    return [skipped, *(step(i, loss_scale_before=32768.0, found_inf=0.0) for i in range(1, 5))]


def fires_on() -> RunLog:
    """A first overflow under fused SGD with momentum."""
    return run(_settling(), setup(scaler=True, groups=[_sgd(fused=1.0)]))


def silent_on() -> RunLog:
    """The same overflow without fused."""
    return run(_settling(), setup(scaler=True, groups=[_sgd(fused=0.0)]))

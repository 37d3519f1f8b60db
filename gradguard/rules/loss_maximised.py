"""An objective with the wrong sign.

Looks at: the derivative of what was differentiated with respect to the loss that was observed: it is negative
when the loss is maximised. Limits: known only when the loss is observed before its backward pass.

Sources: https://docs.pytorch.org/docs/stable/optim.html (maximize).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG310",
    slug="loss-maximised",
    family="optimizer",
    severity=Severity.ERROR,
    summary="The observed loss is maximised, not minimised.",
    remedy="Remove the minus sign before backward(), or maximize=True of the optimizer.",
    needs=(Sight.STEPS, Sight.LOSS_WEIGHT),
    explains=(
        "GG307",
        "GG602",
    ),
)


def check(run: Evidence, *, steps: int = 2) -> Iterator[Finding]:
    """Report optimizers that follow the observed loss uphill at several steps."""
    uphill = {
        (g.optimizer) for g in (run.setup.groups if run.setup else ()) if g.settings.get("maximize")
    }
    for name, records in run.by_optimizer.items():
        sign = -1.0 if name in uphill else 1.0
        wrong = [
            r for r in records if r.window is not None and sign * (r.window.loss_weight or 0.0) < 0
        ]
        if len(wrong) >= steps:
            weight = wrong[0].window.loss_weight if wrong[0].window else 0.0
            yield RULE.finding(
                f"{name!r} follows the observed loss uphill since step {wrong[0].step}: its derivative in what "
                f"is differentiated is {weight:g}",
                place=name,
                first_step=wrong[0].step,
                last_step=wrong[-1].step,
                evidence={"loss_weight": weight or 0.0, "steps": len(wrong)},
            )


def fires_on() -> RunLog:
    """(-loss).backward()."""
    return run([step(i, loss=1.0 + i, window={"loss_weight": -1.0}) for i in range(5)], setup())


def silent_on() -> RunLog:
    """A quarter of the loss of each of four micro-batches is differentiated."""
    return run([step(i, window={"loss_weight": 0.25}) for i in range(5)], setup())

"""A printed loss that is not the loss that was differentiated.

Looks at: the reported loss over the optimised one: a constant factor other than 1 at several steps, while the
loss varies. Limits: a factor that is meant (bits for nats, a per-token loss) looks the same; observe the loss
in the unit that is printed.

Sources: a published training curve was the loss of one batch divided by the number of batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1501",
    slug="loss-misreported",
    family="reporting",
    severity=Severity.ERROR,
    summary="The reported loss is the optimised loss times a constant factor.",
    remedy="Report the mean over the batches that were trained on: divide a sum by the number of values in "
    "it.",
    needs=(Sight.STEPS, Sight.LOSS, Sight.REPORTED_LOSS),
)


def check(run: Evidence, *, steps: int = 3, tolerance: float = 1e-4) -> Iterator[Finding]:
    """Report optimizers whose two losses differ by a constant factor."""
    for name, records in run.by_optimizer.items():
        pairs = [
            (r.step, r.loss, r.reported_loss)
            for r in records
            if r.loss and r.reported_loss is not None and math.isfinite(r.loss)
        ]
        if len(pairs) < steps or len({loss for _, loss, _ in pairs}) < steps:
            continue
        factors = [reported / loss for _, loss, reported in pairs]
        low, high = min(factors), max(factors)
        if high - low <= tolerance * abs(high) and abs(high - 1.0) > 0.01:
            yield RULE.finding(
                f"the reported loss of {name!r} is the optimised one times {high:.4g} at all "
                f"{len(pairs)} steps",
                place=name,
                first_step=pairs[0][0],
                last_step=pairs[-1][0],
                evidence={"factor": high, "steps": len(pairs)},
            )


def fires_on() -> RunLog:
    """The loss of one batch over eight batches."""
    return run([step(i, reported_loss=0.98**i / 8) for i in range(5)], setup())


def silent_on() -> RunLog:
    """The reported loss is a running mean."""
    return run([step(i, reported_loss=(1 + 0.98**i) / 2) for i in range(5)], setup())

"""Steps so large that training is thrown about.

Looks at: the update-to-weight ratio beside the loss: updates of the size of the weights, and a loss that has
grown. Limits: a model that begins at zero weights has large ratios rightly; the loss decides.

Sources: https://cs231n.github.io/neural-networks-3/ (ratio of weights to updates).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import drift, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG307",
    slug="learning-rate-too-high",
    family="optimizer",
    severity=Severity.ERROR,
    summary="The learning rate is too large: the loss grows with every step.",
    remedy="Lower the learning rate tenfold, or warm it up; then look at the gradient norm.",
    needs=(Sight.STEPS, Sight.LOSS),
    explains=(
        "GG602",
        "GG601",
        "GG604",
    ),
)


def check(run: Evidence, *, ratio: float = 0.3, growth: float = 3.0) -> Iterator[Finding]:
    """Report a step as large as the weights after which the loss is several times what it was."""
    for name, records in run.by_optimizer.items():
        start, large = None, None
        for record in records:
            loss = record.loss
            if loss is not None and start is None:
                start = abs(loss)
            grown = (
                loss is not None and start is not None and not abs(loss) <= growth * start + 1e-12
            )
            if large is not None and grown and loss is not None:
                yield RULE.finding(
                    f"since step {large.step} the updates of {name!r} are as large as the weights, and the "
                    f"loss has gone from {start:.4g} to {loss:.4g}",
                    place=name,
                    first_step=large.step,
                    last_step=record.step,
                    evidence={
                        "update_to_weight": _ratio(large),
                        "loss": loss,
                        "first_loss": start or 0.0,
                    },
                )
                break
            if large is None and _ratio(record) > ratio:
                large = record


def _ratio(record: StepRecord) -> float:
    found = None if record.drift is None else record.drift.update_to_weight
    return 0.0 if found is None or math.isnan(found) else found


def fires_on() -> RunLog:
    """Updates twice as large as the weights, and a loss that grows tenfold a step."""
    return run([step(i, loss=10.0**i, drift=drift(update=20.0)) for i in range(5)], setup())


def silent_on() -> RunLog:
    """A noisy loss under ordinary updates."""
    return run([step(i, loss=1.0 + 0.5 * (i % 2)) for i in range(8)], setup())

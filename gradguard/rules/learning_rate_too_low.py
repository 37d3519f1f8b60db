"""Steps so small that nothing can come of them.

Looks at: the update-to-weight ratio of taken steps, beside the loss. At a ratio of 1e-6, moving the weights
by a tenth of their size takes 100,000 steps in one direction. Limits: fine-tuning close to an optimum takes
tiny steps rightly; the ratio must be tiny from the beginning, not rising (warm-up), and the loss must not
fall.

Sources: https://cs231n.github.io/neural-networks-3/ (ratio of weights to updates).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome
from gradguard.rules._runs import drift, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG306",
    slug="learning-rate-too-low",
    family="optimizer",
    severity=Severity.WARNING,
    summary="The learning rate is orders of magnitude too small.",
    remedy="Raise the learning rate until the update-to-weight ratio is about 1e-3, or look for what "
    "divides the gradient.",
    needs=(Sight.STEPS,),
)


def check(
    run: Evidence, *, steps: int = 3, ratio: float = 1e-6, least_fall: float = 1e-3
) -> Iterator[Finding]:
    """Report optimizers all of whose updates were tiny while the loss did not fall."""
    for name, records in run.by_optimizer.items():
        taken = [r for r in records if r.outcome is StepOutcome.APPLIED and r.drift is not None]
        ratios = [r.drift.update_to_weight for r in taken if r.drift is not None]
        known = [one for one in ratios if one is not None]
        if len(known) < steps or max(known) >= ratio or known[-1] > 1.5 * known[0]:
            continue
        losses = [r.loss for r in taken if r.loss is not None]
        half = len(losses) // 2
        fell = half and sum(losses[half:]) / len(losses[half:]) < (1 - least_fall) * (
            sum(losses[:half]) / half
        )
        if not fell or max(known) < 1e-2 * ratio:
            yield RULE.finding(
                f"no step of {name!r} has moved the weights by more than {max(known):.2g} of their size, and "
                "the loss does not fall",
                place=name,
                first_step=taken[0].step,
                last_step=taken[-1].step,
                evidence={
                    "update_to_weight": max(known),
                    "learning_rate": max(taken[-1].learning_rates, default=0.0),
                },
            )


def fires_on() -> RunLog:
    """Updates of 1e-8 of the weights, and a loss that stays where it was."""
    return run([step(i, loss=1.0, drift=drift(update=1e-7)) for i in range(5)], setup())


def silent_on() -> RunLog:
    """A very small but right learning rate: the loss falls."""
    return run([step(i, drift=drift(update=5e-6)) for i in range(8)], setup())

"""A loss that does not vanish at the truth.

Looks at: a probe that gives the loss the targets themselves as the prediction. The loss should be at its
floor there: ``plan.floor`` if it was declared, else 0. Limits: cross entropy with smoothed or soft labels,
likelihoods with a noise of their own and regularised losses have another floor, which has to be declared.

Sources: https://karpathy.github.io/2019/04/25/recipe/ (verify the loss).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import isfinite

from gradguard.evidence import Evidence
from gradguard.facts import Plan, ProbeReading
from gradguard.findings import Finding, Rule, Severity
from gradguard.rules._facts import probe
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG912",
    slug="loss-at-truth",
    family="loss",
    severity=Severity.ERROR,
    summary="The loss does not vanish at the truth: its minimum is somewhere else.",
    remedy="Give the loss the targets as its prediction and follow it term by term; declare plan.floor if the "
    "smallest possible loss is not 0.",
)


def check(run: Evidence, *, share: float = 0.02, least: float = 1e-5) -> Iterator[Finding]:
    """Report a loss at the truth that is not small beside the losses that training began with."""
    for one in run.of(ProbeReading):
        if one.kind != "loss at truth" or one.value is None:
            continue
        floor = run.plan.floor or 0.0
        usual = _usual(run, floor)
        # NaN is no agreement: it fails this test and is reported.
        if abs(one.value - floor) <= max(least, share * usual):
            continue
        yield RULE.finding(
            f"the loss of the truth itself is {one.value:.4g}, not {floor:g}",
            place=one.module or one.line or one.reason or "loss",
            first_step=one.step,
            evidence={"loss_at_truth": one.value, "floor": floor, "usual_loss": usual},
        )
        return


def _usual(run: Evidence, floor: float) -> float:
    """Return how far above the floor training began; 0.0 when not known."""
    known = (r.loss for r in run.steps if r.loss is not None and isfinite(r.loss))
    return max((abs(loss - floor) for loss in islice(known, 3)), default=0.0)


def _probed(value: float, plan: Plan | None = None) -> RunLog:
    found: ProbeReading = probe(0, "loss at truth", value=value)
    return run([step(i) for i in range(4)], setup(plan=plan), found)


def fires_on() -> RunLog:
    """A loss that compares the prediction with shifted targets."""
    return _probed(0.4)


def silent_on() -> RunLog:
    """A likelihood with a noise of its own, whose floor is declared."""
    return _probed(0.35, Plan(floor=0.35))

"""A ReLU layer whose units are off for every row of the batch.

Looks at: the share of units that are 0 for the whole batch behind ReLU-like modules, in training forwards
that record a graph: all of them once, or 95 % of them in two readings in a row. Limits: a sample of 64 rows
is looked at; units that are on for rare inputs only look dead, which is why a few dead units are no finding.

Sources: https://cs231n.github.io/neural-networks-1/#actfun (dying ReLU).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ModuleReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import module
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1102",
    slug="dead-relu",
    family="init",
    severity=Severity.WARNING,
    summary="A ReLU layer is off for every input.",
    remedy="Lower the learning rate or the bias, normalise the input, or use a leaky activation; "
    "dead units never come back by themselves.",
    needs=(Sight.MODULES,),
    explains=(
        "GG502",
        "GG607",
        "GG501",
        "GG306",
    ),
)

_KINDS = ("ReLU", "ReLU6", "LeakyReLU", "Hardswish", "Threshold")


def check(run: Evidence, *, share: float = 0.95) -> Iterator[Finding]:
    """Report a layer with all units dead, or nearly all of them twice."""
    last: dict[str, float] = {}
    told: set[str] = set()
    for one in run.of(ModuleReading):
        dead = one.dead_fraction
        if one.kind not in _KINDS or not (one.training and one.grad) or dead is None:
            continue
        again = min(dead, last.get(one.module, 0.0)) >= share
        if (dead == 1.0 or again) and one.module not in told:
            told.add(one.module)
            yield RULE.finding(
                f"{dead:.0%} of the units of {one.module} ({one.kind}) are 0 for the whole batch",
                place=one.module,
                first_step=one.step,
                evidence={"dead_fraction": dead, "input_rms": one.input_rms or 0.0},
            )
        last[one.module] = dead


def fires_on() -> RunLog:
    """A bias far below zero switches every unit off."""
    return healthy(
        4, *[module(i, "act", "ReLU", dead_fraction=1.0, zero_fraction=1.0) for i in range(3)]
    )


def silent_on() -> RunLog:
    """More than half of the values are 0, as usual behind a ReLU, and some units are off."""
    off = {"dead_fraction": 0.2, "zero_fraction": 0.6, "output_min": 0.0}
    return healthy(4, *[module(i, "act", "ReLU", **off) for i in range(3)])

"""A tanh or sigmoid whose values lie at their bounds from the beginning.

Looks at: the share of outputs within 1 % of a bound, of inner modules in the first three steps. Limits: gates
that are meant to be open or closed look the same; a confident output layer late in training is not looked at.

Sources: https://proceedings.mlr.press/v9/glorot10a.html (saturation of the units).
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
    code="GG1103",
    slug="saturated-activation",
    family="init",
    severity=Severity.WARNING,
    summary="A bounded activation is in its flat region for nearly all values.",
    remedy="Scale the weights in front of it down (or normalise its input): where it is flat, no "
    "gradient passes.",
    needs=(Sight.MODULES,),
    explains=(
        "GG502",
        "GG607",
    ),
)

_EARLY = 3


def check(run: Evidence, *, share: float = 0.9) -> Iterator[Finding]:
    """Report an inner module that is saturated in the first steps."""
    names = [one.name for one in run.setup.modules] if run.setup is not None else []
    output = names[-1] if names else ""
    told: set[str] = set()
    for one in run.of(ModuleReading):
        flat = one.saturated_fraction
        if flat is None or one.step >= _EARLY or one.module in told or one.module == output:
            continue
        if flat >= share and one.training and one.grad:
            told.add(one.module)
            yield RULE.finding(
                f"{flat:.0%} of the outputs of {one.module} ({one.kind}) are at a bound",
                place=one.module,
                first_step=one.step,
                evidence={"saturated_fraction": flat, "input_rms": one.input_rms or 0.0},
            )


def fires_on() -> RunLog:
    """Weights that are far too large drive every tanh to its bound."""
    return healthy(4, *[module(i, "act", "Tanh", saturated_fraction=0.98) for i in range(3)])


def silent_on() -> RunLog:
    """A third of the values is near a bound."""
    return healthy(4, *[module(i, "act", "Tanh", saturated_fraction=0.3) for i in range(3)])

"""Two numbers with one name that are computed differently.

Looks at: a comparison of the training and the validation function on one batch, or of train and eval mode
beyond dropout, that was told to guard.probe. Limits: needs the comparison.

Sources: https://karpathy.github.io/2019/04/25/recipe/ (the evaluation code is a source of errors).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ProbeReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import probe
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1503",
    slug="functions-differ",
    family="reporting",
    severity=Severity.ERROR,
    summary="Training and validation compute different functions.",
    remedy="Call one function for both; look for weights and settings that are read from two "
    "places, and for branches on the mode.",
    needs=(Sight.STEPS,),
)

_KINDS = ("functions differ", "eval differs")


def check(run: Evidence, *, tolerance: float = 1e-3) -> Iterator[Finding]:
    """Report a relative difference above the tolerance."""
    for one in run.of(ProbeReading):
        if one.kind in _KINDS and one.value is not None and not abs(one.value) <= tolerance:
            yield RULE.finding(
                f"on one batch {one.op or 'training and validation'} give numbers that differ by "
                f"{one.value:.2%}",
                place=one.op or one.module or one.line or "validation",
                first_step=one.step,
                evidence={"relative_difference": one.value},
            )
            return


def fires_on() -> RunLog:
    """The validation loss uses another weight."""
    return healthy(4, probe(0, "functions differ", value=0.4, op="validation loss"))


def silent_on() -> RunLog:
    """The same function to rounding."""
    return healthy(4, probe(0, "functions differ", value=3e-7, op="validation loss"))

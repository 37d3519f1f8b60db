"""A load_state_dict with strict=False that restored nothing.

Looks at: how many keys of the model were given, and how many keys were given that it does not have. Limits:
loads before watching began are not seen; adapters and replaced heads match everything that is given, or most
of the model.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.load_state_dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradguard.evidence import Evidence
from gradguard.facts import LoadReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import loaded
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1401",
    slug="checkpoint-not-loaded",
    family="checkpoint",
    severity=Severity.ERROR,
    summary="A checkpoint was loaded that matches (nearly) none of the model's keys.",
    remedy="Strip the prefix (module., _orig_mod., ema.) from the keys, and load with "
    "strict=True, or look at the missing keys that load_state_dict returns.",
    needs=(Sight.LOADS,),
)


def check(run: Evidence, *, share: float = 0.5) -> Iterator[Finding]:
    """Report a load that brought unknown keys and matched less than half of the model."""
    for one in run.of(LoadReading):
        matched = one.matched / one.expected if one.expected else 1.0
        if one.unexpected and matched < share:
            yield RULE.finding(
                f"load_state_dict matched {one.matched} of {one.expected} keys of {one.target}; it was given "
                f"unknown ones such as {one.unexpected[0]!r}",
                place=one.missing[0] if one.missing else one.target,
                first_step=one.step,
                evidence={"matched": one.matched, "expected": one.expected},
            )


def fires_on() -> RunLog:
    """Every key carries the prefix of a wrapper."""
    nothing: dict[str, Any] = {
        "matched": 0,
        "missing": ("first.weight",),
        "unexpected": ("module.first.weight",),
    }
    return healthy(4, loaded(**nothing))


def silent_on() -> RunLog:
    """An adapter's few keys, all of which are known."""
    return healthy(4, loaded(expected=100, matched=4, missing=("first.weight",)))

"""An eps that is zero in the precision of the weights.

Looks at: float16 parameters under an optimizer that divides by a root plus eps, beside steps that ended in
NaN or Inf. The usual eps of 1e-8 is below half of the smallest float16 number and becomes 0: where the
gradient (or its square, below 2.4e-4) is 0 too, the update is 0 / 0. Limits: said only once something has
become non-finite; bfloat16 has the range of float32 and is not concerned.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html;
https://en.wikipedia.org/wiki/Half-precision_floating-point_format.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._runs import NAMES, group, parameter, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG203",
    slug="eps-underflow",
    family="precision",
    severity=Severity.ERROR,
    summary="The optimizer's eps is 0 in float16, and the update divides by zero.",
    remedy="Keep float32 weights and use autocast, or set eps to 1e-4 or more for float16 weights.",
    needs=(Sight.STEPS, Sight.SETUP),
    explains=("GG604", "GG602", "GG601"),
)

_ZERO_IN_HALF = 2.0**-25
"""Rounds to 0 in float16, as does everything below."""


def check(run: Evidence, *, largest: float = _ZERO_IN_HALF) -> Iterator[Finding]:
    """Report groups of float16 parameters with a vanishing eps once a step has corrupted them."""
    half = {
        (p.optimizer, p.group)
        for p in (run.setup.parameters if run.setup else ())
        if p.dtype == "float16" and p.trainable
    }
    for one in run.setup.groups if run.setup else ():
        eps = one.settings.get("eps")
        if eps is None or (one.optimizer, one.index) not in half or not eps <= largest:
            continue
        records = run.by_optimizer.get(one.optimizer, ())
        first = next((r for r in records if r.outcome is StepOutcome.CORRUPTED), None)
        if first is not None:
            yield RULE.finding(
                f"eps {eps:g} of group {one.index} of {one.optimizer!r} ({one.kind}) is 0 in its float16 "
                f"parameters, and step {first.step} wrote NaN or Inf into them",
                place=f"group {one.index}",
                first_step=first.step,
                evidence={"eps": eps, "smallest": 2.0**-24},
            )


def _corrupted(number: int) -> StepRecord:
    return step(number, outcome=StepOutcome.CORRUPTED)


def fires_on() -> RunLog:
    """AdamW with its usual eps on float16 weights."""
    half = [parameter(n, dtype="float16") for n in NAMES]
    return run([_corrupted(0)], setup(parameters=half))


def silent_on() -> RunLog:
    """AdamW with an eps of 1e-4 on float16 weights."""
    half = [parameter(n, dtype="float16") for n in NAMES]
    return run([step(i) for i in range(5)], setup(parameters=half, groups=[group(eps=1e-4)]))

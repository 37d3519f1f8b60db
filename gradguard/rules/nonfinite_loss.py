"""A loss that is NaN or infinite.

Looks at: the observed loss of every attempt. Limits: what made it so must be looked for in the forward pass;
a term of the loss is named where terms are observed.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.isfinite.html.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._probes import birth_of, where
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG602",
    slug="nonfinite-loss",
    family="numerics",
    severity=Severity.ERROR,
    summary="The forward pass, or the loss itself, makes NaN or Inf.",
    remedy="Look with gg.locate_nonfinite for the first operation that does: log or division by 0, sqrt of "
    "a negative number, exp of a large one, or the batch.",
    needs=(Sight.STEPS, Sight.LOSS),
    explains=(
        "GG101",
        "GG601",
        "GG604",
        "GG502",
        "GG501",
    ),
    asks=True,
)


def check(run: Evidence) -> Iterator[Finding]:
    """Report the first attempt whose loss is not finite."""
    for name, records in run.by_optimizer.items():
        bad = [r for r in records if r.loss is not None and not math.isfinite(r.loss)]
        if bad:
            first = bad[0]
            terms = [term for term, value in first.terms.items() if not math.isfinite(value)]
            term = f"; the term {terms[0]!r} is" if terms else ""
            yield RULE.finding(
                f"the loss of {name!r} is {first.loss} at step {first.step}{term}"
                f"{where(birth_of(run))}",
                place=terms[0] if terms else None,
                first_step=first.step,
                last_step=bad[-1].step,
                evidence={"loss": first.loss or math.nan, "steps": len(bad)},
            )


def fires_on() -> RunLog:
    """The loss is NaN from step 3 on."""
    return run([step(i, loss=math.nan if i >= 3 else 1.0) for i in range(6)], setup())


def silent_on() -> RunLog:
    """A noisy loss with one large value."""
    return run([step(i, loss=50.0 if i == 3 else 1.0) for i in range(6)], setup())

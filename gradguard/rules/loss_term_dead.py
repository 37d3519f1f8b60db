"""A term of the loss that never changes, or counts for nothing.

Looks at: the observed terms: bit-equal at several steps while the loss varies, or with a derivative of
exactly 0 in what was differentiated. Limits: a hinge that is satisfied is 0 rightly, so a term at 0 must have
been there from the beginning; a regulariser of frozen weights is constant rightly.

Sources: a published loss had four terms that were 0 for every input, because their errors were swallowed.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG906",
    slug="loss-term-dead",
    family="loss",
    severity=Severity.WARNING,
    summary="A term of the loss is constant or has no weight: it teaches nothing.",
    remedy="Look at how the term is computed (a swallowed exception, a detached tensor, a weight of 0, a "
    "missing key).",
    needs=(Sight.STEPS, Sight.TERMS),
)


def check(run: Evidence, *, steps: int = 3) -> Iterator[Finding]:
    """Report terms that are the same at all steps, or whose derivative is 0 at all steps."""
    for name, records in run.by_optimizer.items():
        seen = [r for r in records if r.terms]
        losses = {r.loss for r in seen}
        for term in seen[0].terms if seen else ():
            values = [r.terms[term] for r in seen if term in r.terms]
            weights = [r.window.term_weights.get(term) for r in seen if r.window is not None]
            if len(values) < steps:
                continue
            unweighted = weights and all(weight == 0.0 for weight in weights)
            constant = len(losses) > 1 and all(value == values[0] for value in values)
            if unweighted or constant:
                how = (
                    "has no weight in what is differentiated"
                    if unweighted
                    else f"is always {values[0]:g}"
                )
                yield RULE.finding(
                    f"the term {term!r} of the loss of {name!r} {how}, at all {len(values)} steps",
                    place=term,
                    first_step=seen[0].step,
                    last_step=seen[-1].step,
                    evidence={"value": values[-1], "steps": len(values)},
                )


def fires_on() -> RunLog:
    """A term that is 0 at every step."""
    return run([step(i, terms={"fit": 0.98**i, "align": 0.0}) for i in range(5)], setup())


def silent_on() -> RunLog:
    """A hinge that is satisfied from step 2 on."""
    hinge = [0.5, 0.1, 0.0, 0.0, 0.0]
    return run([step(i, terms={"fit": 0.98**i, "gap": hinge[i]}) for i in range(5)], setup())

"""Accumulation of which only the last micro-batch is left.

Looks at: how many micro-steps of a window begin with an empty gradient: one should. Limits: the sample holds
up to three parameters; of windows with more than 64 micro-steps only the first are looked at.

Sources: https://docs.pytorch.org/docs/stable/notes/amp_examples.html (gradient accumulation).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG707",
    slug="accumulation-lost",
    family="gradient handling",
    severity=Severity.ERROR,
    summary="Gradients are cleared within the accumulation window.",
    remedy="Call zero_grad() once per optimizer step, not once per micro-batch.",
    needs=(Sight.STEPS,),
)


def check(run: Evidence, *, steps: int = 2) -> Iterator[Finding]:
    """Report optimizers that begin anew within a window, several times."""
    for name, records in run.by_optimizer.items():
        lost = [
            r
            for r in records
            if r.window is not None
            and (r.window.fresh_micro_steps or 0) > 1
            and (r.window.backward_norm or 0.0) > 0
        ]
        if len(lost) >= steps:
            fresh = lost[0].window.fresh_micro_steps if lost[0].window else 0
            yield RULE.finding(
                f"{fresh} of {lost[0].micro_steps} micro-steps of {name!r} begin with an empty gradient: "
                "what the earlier ones brought is lost",
                place=name,
                first_step=lost[0].step,
                last_step=lost[-1].step,
                evidence={"fresh": fresh or 0, "micro_steps": lost[0].micro_steps or 0},
            )


def fires_on() -> RunLog:
    """zero_grad in every one of four micro-steps."""
    return run([step(i, micro_steps=4, window={"fresh_micro_steps": 4}) for i in range(5)], setup())


def silent_on() -> RunLog:
    """Four micro-steps that accumulate."""
    return run([step(i, micro_steps=4) for i in range(5)], setup())

"""A step gate that says no most of the time.

Looks at: the share of vetoed attempts. A gate is there for rare events. Limits: a real and lasting fault of
the gradients makes a good gate veto as well; the reason it gives tells the two apart.

Sources: https://github.com/wandb/senpai/pull/3294 (393 of 394 steps skipped).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG710",
    slug="gate-too-strict",
    family="gradient handling",
    severity=Severity.ERROR,
    summary="The step gate vetoes a large share of all steps.",
    remedy="Loosen the policy that is named, or mend what it rightly objects to.",
    needs=(Sight.STEPS,),
    explains=("GG306",),
)


def check(run: Evidence, *, steps: int = 5, share: float = 0.2, row: int = 4) -> Iterator[Finding]:
    """Report optimizers a large share, or a long row, of whose attempts were vetoed."""
    for name, records in run.by_optimizer.items():
        vetoed = [r for r in records if r.outcome is StepOutcome.VETOED]
        if len(vetoed) < row:
            continue
        longest, current = 0, 0
        for record in records:
            current = current + 1 if record.outcome is StepOutcome.VETOED else 0
            longest = max(longest, current)
        often = len(records) >= steps and len(vetoed) > share * len(records)
        if often or longest >= row:
            yield RULE.finding(
                f"the gate vetoed {len(vetoed)} of {len(records)} steps of {name!r}: "
                f"{vetoed[0].reason or 'no reason given'}",
                place=name,
                first_step=vetoed[0].step,
                last_step=vetoed[-1].step,
                evidence={"vetoed": len(vetoed), "attempts": len(records)},
            )


def fires_on() -> RunLog:
    """Half of all steps are vetoed."""
    veto = {"outcome": StepOutcome.VETOED, "reason": "gradient norm 1 is above 0.5", "drift": None}
    return run([step(i, **(veto if i % 2 else {})) for i in range(12)], setup())


def silent_on() -> RunLog:
    """One spike in twelve steps."""
    veto = {"outcome": StepOutcome.VETOED, "reason": "gradient norm 90 is above 3", "drift": None}
    return run([step(i, **(veto if i == 6 else {})) for i in range(12)], setup())

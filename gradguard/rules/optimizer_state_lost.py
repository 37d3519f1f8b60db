"""An optimizer that forgets its moments while it trains.

Looks at: how many parameters the optimizer holds state for when a step begins. After a taken step it must not
fall. Once may be meant (a warm restart); again and again is a mistake. Limits: an optimizer that is made anew
is another object.

Sources: https://docs.pytorch.org/docs/stable/optim.html (per-parameter state).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import WindowReading
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG309",
    slug="optimizer-state-lost",
    family="optimizer",
    severity=Severity.WARNING,
    summary="The optimizer's state (momentum, second moments) is reset during training.",
    remedy="Do not clear optimizer.state or make a new optimizer inside the loop; load its state dict once, "
    "before training.",
    needs=(Sight.STEPS,),
)


def check(run: Evidence, *, times: int = 2) -> Iterator[Finding]:
    """Report optimizers that begin several steps with less state than the last one left."""
    for name, records in run.by_optimizer.items():
        losses = [r.step for r in records if _lost(r.window)]
        if len(losses) >= times:
            yield RULE.finding(
                f"the state of {name!r} was lost {len(losses)} times, first before step {losses[0]}",
                place=name,
                first_step=losses[0],
                last_step=losses[-1],
                evidence={"times": len(losses)},
            )


def _lost(window: WindowReading | None) -> bool:
    if window is None or window.state_entries is None or window.state_left is None:
        return False
    return window.state_entries < window.state_left


def fires_on() -> RunLog:
    """State is cleared before every step."""
    lost = {"state_entries": 0, "state_left": 4}
    return run([step(i, window=lost if i else {}) for i in range(5)], setup())


def silent_on() -> RunLog:
    """State is made by the first step and kept."""
    kept = {"state_entries": 4, "state_left": 4}
    return run([step(i, window=kept if i else {"state_entries": 0}) for i in range(5)], setup())

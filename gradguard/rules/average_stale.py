"""An averaged copy (EMA, SWA, target network) that stands still while the model moves.

Looks at: sampled values of the copy, which never changed in at least three readings, while the live weights
moved by more than 1 %. Limits: an average that begins late in training, or a target network that is replaced
every so many steps, looks the same until its turn: judged after 100 steps only, and a copy that has ever
changed is never reported.

Sources: https://docs.pytorch.org/docs/stable/optim.html (update_parameters).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradguard.evidence import Evidence
from gradguard.facts import CopyReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import copied
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1201",
    slug="average-stale",
    family="averaging",
    severity=Severity.WARNING,
    summary="An averaged copy of the model is not updated.",
    remedy="Call the update of the average after every optimizer step that was taken.",
    needs=(Sight.COPIES,),
)


def check(
    run: Evidence, *, readings: int = 3, steps: int = 100, moved: float = 0.01
) -> Iterator[Finding]:
    """Report an average that has never changed although the live weights have."""
    by_name: dict[str, list[CopyReading]] = {}
    for one in run.of(CopyReading):
        if one.role == "averaged":
            by_name.setdefault(one.name, []).append(one)
    for name, found in by_name.items():
        known = [one.changed for one in found if one.changed is not None]
        last = found[-1]
        if len(known) < readings or any(known) or last.step < steps:
            continue
        if (last.live_moved or 0.0) > moved:
            yield RULE.finding(
                f"copy {name!r} has not changed in {last.step} steps, the live weights by "
                f"{last.live_moved:.1%}",
                place=name,
                first_step=found[0].step,
                last_step=last.step,
                evidence={"readings": len(known), "live_moved": last.live_moved or 0.0},
            )


def fires_on() -> RunLog:
    """The update of the average is never called."""
    still: dict[str, Any] = {"changed": False, "copy_moved": 0.0}
    return healthy(4, *[copied(i, **still) for i in (0, 1, 2, 50, 100, 150)])


def silent_on() -> RunLog:
    """A slow average that lags far behind and moves."""
    return healthy(4, *[copied(i, lag=0.5) for i in (0, 1, 2, 50, 100, 150)])

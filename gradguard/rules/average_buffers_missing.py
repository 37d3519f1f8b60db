"""An averaged copy whose buffers (running statistics) are those of the beginning.

Looks at: the largest relative distance of a floating buffer of the copy from the live one, while the copy's
parameters follow. Limits: buffers that are refreshed right before use (update_bn) look the same until then:
judged after 20 steps.

Sources: https://docs.pytorch.org/docs/stable/optim.html#taking-care-of-batch-normalization.
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
    code="GG1202",
    slug="average-buffers-missing",
    family="averaging",
    severity=Severity.WARNING,
    summary="The buffers of an averaged copy are left behind.",
    remedy="Copy the buffers with the parameters, or run torch.optim.swa_utils.update_bn on the "
    "average before it is used.",
    needs=(Sight.COPIES,),
)


def check(
    run: Evidence, *, distance: float = 0.5, moved: float = 0.1, steps: int = 20
) -> Iterator[Finding]:
    """Report an average whose buffers differ by more than half while its parameters follow."""
    told: set[str] = set()
    for one in run.of(CopyReading):
        if one.role != "averaged" or one.buffers_differ is None or one.name in told:
            continue
        follows = bool(one.changed) and (one.lag or 0.0) < distance / 2
        live = one.live_buffers_moved or 0.0
        if one.step >= steps and follows and live > moved and one.buffers_differ > distance:
            told.add(one.name)
            yield RULE.finding(
                f"a buffer of copy {one.name!r} differs from the live one by {one.buffers_differ:.0%}; its "
                f"parameters by {one.lag or 0.0:.1%}",
                place=one.name,
                first_step=one.step,
                evidence={"buffers_differ": one.buffers_differ, "live_buffers_moved": live},
            )


def fires_on() -> RunLog:
    """Only parameters are averaged, and the running statistics stay where they began."""
    left: dict[str, Any] = {"buffers_differ": 0.9, "live_buffers_moved": 2.0}
    return healthy(4, *[copied(i, **left) for i in (0, 1, 2, 50)])


def silent_on() -> RunLog:
    """Buffers are copied with every update."""
    kept: dict[str, Any] = {"buffers_differ": 0.01, "live_buffers_moved": 2.0}
    return healthy(4, *[copied(i, **kept) for i in (0, 1, 2, 50)])

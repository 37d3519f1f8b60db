"""A teacher or reference model whose weights move.

Looks at: sampled values of copies that are followed with role="frozen". Limits: buffers are not compared; a
teacher in train mode may move its running statistics unseen.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import CopyReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import copied
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1204",
    slug="frozen-model-moves",
    family="averaging",
    severity=Severity.ERROR,
    summary="A model that must not change does change.",
    remedy="Set requires_grad_(False) and eval() on it, keep its parameters out of every "
    "optimizer, and make it a real copy.",
    needs=(Sight.COPIES,),
)


def check(run: Evidence, *, moved: float = 0.0) -> Iterator[Finding]:
    """Report every frozen copy that changed, once."""
    told: set[str] = set()
    for one in run.of(CopyReading):
        if one.role == "frozen" and one.changed and one.name not in told:
            distance = one.copy_moved or 0.0
            if distance > moved:
                told.add(one.name)
                yield RULE.finding(
                    f"{one.name!r} should be frozen and has moved by {distance:.2g} of its norm",
                    place=one.name,
                    first_step=one.step,
                    evidence={"copy_moved": distance},
                )


def fires_on() -> RunLog:
    """The teacher's parameters are in the optimizer."""
    return healthy(4, *[copied(i, "teacher", role="frozen", copy_moved=0.01 * i) for i in range(3)])


def silent_on() -> RunLog:
    """The teacher stands still while the student walks away."""
    still = {"role": "frozen", "changed": False, "copy_moved": 0.0, "lag": 0.4}
    return healthy(4, *[copied(i, "teacher", **still) for i in range(3)])

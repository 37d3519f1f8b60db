"""A copy that is none: its tensors lie in the same memory as the live weights.

Looks at: where the tensors of a followed copy lie. Limits: only copies that are followed (averaged=,
follow_copy).

Sources: https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html (state_dict returns a
reference).
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
    code="GG1203",
    slug="snapshot-aliased",
    family="averaging",
    severity=Severity.ERROR,
    summary="A copy of the model shares memory with the live weights.",
    remedy="Make a real copy: copy.deepcopy(model), or "
    "{name: value.clone() for name, value in model.state_dict().items()}.",
    needs=(Sight.COPIES,),
    explains=("GG1204",),
)


def check(run: Evidence, *, tensors: int = 1) -> Iterator[Finding]:
    """Report every copy that shares memory, once."""
    told: set[str] = set()
    for one in run.of(CopyReading):
        if one.shared_tensors >= tensors and one.name not in told:
            told.add(one.name)
            yield RULE.finding(
                f"{one.shared_tensors} tensors of copy {one.name!r} are the live weights themselves",
                place=one.name,
                first_step=one.step,
                evidence={"shared_tensors": one.shared_tensors},
            )


def fires_on() -> RunLog:
    """The best weights are kept as model.state_dict()."""
    return healthy(
        4, *[copied(i, "best", role="snapshot", shared_tensors=4, lag=0.0) for i in range(3)]
    )


def silent_on() -> RunLog:
    """A deep copy that stays where it was."""
    kept = {"role": "snapshot", "changed": False, "copy_moved": 0.0}
    return healthy(4, *[copied(i, "best", **kept) for i in range(3)])

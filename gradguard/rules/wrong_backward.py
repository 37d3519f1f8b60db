"""A hand-written backward whose derivative is not that of its forward.

Looks at: what a probe found that compared the gradient with finite differences: the difference of both,
relative to the larger one. Limits: needs a probe; a derivative that differs on purpose (a straight-through
estimate, a gradient reversal) looks the same, so this is a warning.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.autograd.gradcheck.gradcheck.html.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ProbeReading
from gradguard.findings import Finding, Rule, Severity
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG503",
    slug="wrong-backward",
    family="gradient path",
    severity=Severity.WARNING,
    summary="The backward of an operation disagrees with the finite difference of its forward.",
    remedy="Check the operation with torch.autograd.gradcheck in float64, and mend its backward. A "
    "straight-through estimate or a gradient reversal is meant to disagree: ignore the rule then.",
    explains=("GG502", "GG601", "GG607", "GG608"),
)


def check(run: Evidence, *, limit: float = 0.1) -> Iterator[Finding]:
    """Report every place whose gradient is off by more than single precision explains."""
    seen: set[str] = set()
    for probe in run.of(ProbeReading):
        if probe.kind != "wrong backward" or probe.value is None:
            continue
        place = probe.op or probe.module or probe.parameter or "the model"
        # NaN is no agreement: it fails this test and is reported.
        if probe.value <= limit or place in seen:
            continue
        seen.add(place)
        line = f" ({probe.line})" if probe.line else ""
        of = f"the gradient of {probe.parameter}" if probe.parameter else "a gradient"
        yield RULE.finding(
            f"{of} through {place}{line} differs from the finite difference by {probe.value:.0%} of the "
            "larger one",
            place=probe.parameter or probe.module or place,
            first_step=probe.step,
            evidence={"disagreement": probe.value},
        )


def _probed(value: float) -> ProbeReading:
    return ProbeReading(
        step=0,
        kind="wrong backward",
        parameter="first.weight",
        op="Square",
        module="first",
        line="square.py:12",
        phase="backward",
        value=value,
    )


def fires_on() -> RunLog:
    """A backward that forgot a factor of two."""
    return healthy(4, _probed(0.5))


def silent_on() -> RunLog:
    """A right backward, as exactly as float32 shows it."""
    return healthy(4, _probed(0.01))

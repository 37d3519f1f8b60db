"""A reported number that cannot be what its name says.

Looks at: numbers given to guard.report: NaN; the same number to the last bit five times although the weights
move; the drift or update of a copy given for that of the model. Limits: 0, 1 and whole numbers may well
repeat and are left out, and so are numbers without a split.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import CopyReading, MetricReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import copied, metric
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1502",
    slug="metric-misreported",
    family="reporting",
    severity=Severity.WARNING,
    summary="A reported number is not what it claims to be.",
    remedy="Compute it from the live weights of this moment: look for a cached value, a detached "
    "copy, the wrong split, or an average that was reset.",
    needs=(Sight.METRICS,),
)

_MOTION = ("drift", "update", "movement", "moved")


def check(run: Evidence, *, repeats: int = 5) -> Iterator[Finding]:
    """Report numbers that are NaN, that never change, or that tell the motion of a copy."""
    copies = {one.name for one in run.of(CopyReading)}
    by_name: dict[tuple[str, str | None], list[MetricReading]] = {}
    for one in run.of(MetricReading):
        by_name.setdefault((one.name, one.split), []).append(one)
    for (name, split), found in by_name.items():
        reason = _copied(found[0], copies) or _broken(found) or _frozen(found, split, repeats)
        if reason:
            yield RULE.finding(
                f"{name}: {reason}",
                place=name,
                first_step=found[0].step,
                last_step=found[-1].step,
                evidence={"reports": len(found)},
            )


def _copied(first: MetricReading, copies: set[str]) -> str | None:
    motion = any(word in first.name.lower() for word in _MOTION)
    if motion and first.weights is not None and first.weights in copies:
        return f"it is read from the copy {first.weights!r}, which moves far less than the model"
    return None


def _broken(found: list[MetricReading]) -> str | None:
    bad = any(one.value is not None and one.value != one.value for one in found)
    return "it is NaN" if bad else None


def _frozen(found: list[MetricReading], split: str | None, repeats: int) -> str | None:
    last = [one.value for one in found[-repeats:]]
    value, steps = last[0], {one.step for one in found[-repeats:]}
    if split is None or value is None or value.is_integer() or len(steps) < repeats:
        return None
    return f"it was exactly {value:.6g} {repeats} times" if set(last) == {value} else None


def fires_on() -> RunLog:
    """The drift of the parameters is read from the averaged copy."""
    seen = [metric(i, "drift", 1e-4 + 1e-6 * i, split=None, weights="averaged") for i in range(4)]
    return healthy(4, *[copied(i) for i in range(3)], *seen)


def silent_on() -> RunLog:
    """An accuracy that has reached 1.0, and a loss that falls."""
    done = [metric(i, "accuracy", 1.0) for i in range(6)]
    return healthy(8, *done, *[metric(i, "loss", 0.5 - 0.01 * i) for i in range(6)])

"""An output activation that cannot reach the targets.

Looks at: outputs that come straight from a bounded operation (sigmoid, softmax, tanh, relu, softplus) into a
regression loss, and the range, mean and spread of floating targets: an ordinary part of them lies outside the
bound, not only a few outliers. The observed loss must be as large as that makes it, so that targets which are
scaled on their way into the loss are silent. Limits: integer targets are not judged, nor are other losses.

Sources: https://karpathy.github.io/2019/04/25/recipe/ (init well: final layer).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import erf, exp, inf, isfinite, pi, sqrt

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading, GraphNode, LossReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import batch, loss_graph, node
from gradguard.rules._graphs import REGRESSION, SAME_VALUES, below
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG905",
    slug="output-range-mismatch",
    family="loss",
    severity=Severity.ERROR,
    summary="The output activation is bounded, and targets lie outside its range.",
    remedy="Remove the last activation, or scale the targets into its range.",
    needs=(Sight.LOSS_GRAPH, Sight.TARGETS),
    explains=("GG502", "GG910"),
)

_BOUNDS = {
    "Sigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Hardsigmoid": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Hardtanh": (-1.0, 1.0),
    "Relu": (0.0, inf),
    "Softplus": (0.0, inf),
    "Exp": (0.0, inf),
}
_KINDS = {"Softmax", "Sigmoid", "Hardsigmoid", "Tanh", "Hardtanh", "ReLU", "Softplus"}


def check(
    run: Evidence, *, excess: float = 0.25, slack: float = 0.1, readings: int = 2
) -> Iterator[Finding]:
    """Report a bounded output whose targets go beyond it by a part of their spread, and are not outliers."""
    targets = {b.step: b for b in run.of(BatchReading) if _is_judged(b)}
    values = {record.step: record.loss for record in run.steps}
    found: list[tuple[LossReading, str, BatchReading]] = []
    for reading in run.of(LossReading):
        bound = _bound(reading)
        goal = targets.get(reading.step)
        if bound is None or goal is None or reading.name != "loss":
            continue
        if not _is_beyond(goal, _BOUNDS[bound], excess, slack):
            continue
        if not _is_compared(reading, goal, _BOUNDS[bound], values.get(reading.step)):
            return  # the loss was given other targets than these
        found.append((reading, bound, goal))
    if len(found) < readings:
        return
    first, bound, goal = found[0]
    low, high = _BOUNDS[bound]
    yield RULE.finding(
        f"the output is that of a {bound.lower()} and lies between {low:g} and {high:g}; the targets go from "
        f"{goal.minimum:.3g} to {goal.maximum:.3g}",
        place=_place(run, bound) or "targets",
        first_step=first.step,
        last_step=found[-1][0].step,
        evidence={"minimum": goal.minimum or 0.0, "maximum": goal.maximum or 0.0, "lowest": low},
    )


def _is_judged(one: BatchReading) -> bool:
    numbers = (one.minimum, one.maximum, one.mean, one.std)
    known = all(number is not None and isfinite(number) for number in numbers)
    return one.tensor == "targets" and one.split == "train" and "float" in one.dtype and known


def _bound(reading: LossReading) -> str | None:
    """Return the bounded operation that makes the output, if that is compared with targets as it is."""
    front = [one for one in reading.nodes if one.name in REGRESSION] or _by_hand(reading)
    for _ in range(8):
        names = {name for one in front for name in one.follows if name in _BOUNDS}
        if names:
            return next(iter(names)) if len(names) == 1 else None
        front = [n for o in front for n in below(reading, o) if n.name in SAME_VALUES | {"Expand"}]
    return None


def _by_hand(reading: LossReading) -> list[GraphNode]:
    """Return the difference of a mean of absolute or squared differences."""
    if reading.nodes[:1] and reading.nodes[0].name == "Mean":
        for distance in below(reading, reading.nodes[0]):
            if distance.name in ("Abs", "Pow"):
                found = below(reading, distance)
                return [n for n in found if n.name in ("Sub", "Rsub") and len(n.follows) == 1]
    return []


def _is_beyond(goal: BatchReading, bound: tuple[float, float], excess: float, slack: float) -> bool:
    mean, std = goal.mean or 0.0, goal.std or 0.0
    over = (goal.maximum or 0.0) - bound[1] > excess * std and mean + (1 + slack) * std > bound[1]
    under = bound[0] - (goal.minimum or 0.0) > excess * std and mean - (1 + slack) * std < bound[0]
    return over or under


def _is_compared(
    reading: LossReading, goal: BatchReading, bound: tuple[float, float], loss: float | None
) -> bool:
    """Whether the loss is as large as these targets make it; a smaller one was given others."""
    top = reading.nodes[0]
    if loss is None or top.reduction == 2 or not goal.std:
        return False
    squared = top.name == "MseLoss" or "Pow" in top.follows
    mean, std = goal.mean or 0.0, goal.std or 0.0
    missed = _missed((bound[0] - mean) / std, squared) + _missed((mean - bound[1]) / std, squared)
    return not loss < 0.25 * missed * std ** (1 + squared)


def _missed(bound: float, squared: bool) -> float:
    """Return the mean (squared) distance to a bound of what lies beyond it, for normal values.

    Args:
        bound: how many standard deviations the mean is beyond the bound.
        squared: whether distances are squared.
    """
    if bound == -inf:
        return 0.0
    share = 0.5 * (1 + erf(bound / sqrt(2)))
    density = exp(-0.5 * bound**2) / sqrt(2 * pi)
    return (1 + bound**2) * share + bound * density if squared else bound * share + density


def _place(run: Evidence, bound: str) -> str | None:
    modules = run.setup.modules if run.setup else ()
    for one in reversed(modules):
        if one.kind in _KINDS and one.kind.lower() == bound.lower():
            return one.name or None
    return None


def _squares(number: int, last: str) -> LossReading:
    return loss_graph(
        number,
        node("MseLoss", 0, last, shape=(), reduction=1),
        node(last, 1, "Addmm", shape=(32, 1)),
        output_shape=(32, 1),
    )


def _goals(number: int, low: float, high: float, mean: float, std: float) -> BatchReading:
    values = {"minimum": low, "maximum": high, "mean": mean, "std": std, "distinct": 32}
    return batch(number, "targets", dtype="float32", shape=(32, 1), rows=None, **values)


def fires_on() -> RunLog:
    """Standardised targets below a sigmoid."""
    facts = [one for i in range(3) for one in (_squares(i, "Sigmoid"), _goals(i, -2, 2, 0, 1))]
    return healthy(6, *facts)


def silent_on() -> RunLog:
    """Counts with a little noise below zero, under a relu."""
    facts = [one for i in range(3) for one in (_squares(i, "Relu"), _goals(i, -0.1, 9, 3, 2))]
    return healthy(6, *facts)

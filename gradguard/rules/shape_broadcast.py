"""Prediction and target of different shapes that broadcast to a larger one.

Looks at: a regression loss (mse_loss, smooth_l1_loss, huber_loss) whose prediction is expanded to more values
than the model gave, and a difference of N predictions with something else that has N * N values. Silent where
the loss itself adds a dimension to the prediction or subtracts predictions from each other: pairwise losses
are meant so. Limits: a target that is expanded to the shape of the prediction is not seen; nor is a product.

Sources: https://docs.pytorch.org/docs/stable/notes/broadcasting.html, and the warning of mse_loss about a
target size that differs.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import GraphNode, LossReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import loss_graph, node
from gradguard.rules._graphs import REGRESSION, below, head, output_shape, values_of
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG902",
    slug="shape-broadcast",
    family="loss",
    severity=Severity.ERROR,
    summary="Prediction and target broadcast: every prediction is compared with every target.",
    remedy="Give both the same shape (prediction.squeeze(-1) or target.unsqueeze(-1)), and assert it.",
    needs=(Sight.LOSS_GRAPH,),
    explains=("GG306", "GG910"),
)

_DIFFERENCES = frozenset(("Sub", "Rsub"))


def check(run: Evidence, *, readings: int = 2) -> Iterator[Finding]:
    """Report every loss whose prediction is broadcast to a larger shape, by name."""
    found: dict[str, list[tuple[int, GraphNode, tuple[int, ...]]]] = {}
    for reading in run.of(LossReading):
        wide, shape = _broadcast(reading), output_shape(reading)
        if wide is not None and shape is not None:
            found.setdefault(reading.name, []).append((reading.step, wide, shape))
    for name, several in found.items():
        if len(several) < readings:
            continue
        first, wide, shape = several[0]
        yield RULE.finding(
            f"{name!r}: an output of shape {shape} becomes {wide.shape} in the loss ({wide.name}): it is "
            "broadcast against its target",
            place=name,
            first_step=first,
            last_step=several[-1][0],
            evidence={"values": values_of(wide.shape) or 0, "predictions": values_of(shape) or 0},
        )


def _broadcast(reading: LossReading) -> GraphNode | None:
    count = values_of(output_shape(reading))
    if count is None or count < 2:
        return None
    own = head(reading)
    paired = any(one.name == "Unsqueeze" for one in own)
    for one in own:
        size = values_of(one.shape)
        if size is None or size <= count or not _is_given(reading, one, count):
            continue
        if one.name == "Expand" and _feeds(reading, one, REGRESSION):
            return one
        square = size == count * count and not paired and len(one.follows) == 1
        if square and (one.name in _DIFFERENCES or _feeds(reading, one, _DIFFERENCES)):
            return one
    return None


def _feeds(reading: LossReading, node: GraphNode, names: frozenset[str]) -> bool:
    """Whether it alone (but for the target) feeds an operation of these names."""
    return any(
        one.name in names and one.follows == (node.name,) and one.depth == node.depth - 1
        for one in reading.nodes
    )


def _is_given(reading: LossReading, node: GraphNode, count: int) -> bool:
    """Whether the operation is given as many values as the model's output has."""
    given = list(below(reading, node))
    return bool(given) and all(values_of(one.shape) == count for one in given)


def _squared(
    number: int, shape: tuple[int, ...], difference: GraphNode, *rest: GraphNode
) -> LossReading:
    return loss_graph(
        number,
        node("Mean", 0, "Pow", shape=()),
        node("Pow", 1, "Sub", shape=difference.shape),
        difference,
        *rest,
        node("Addmm", 3 + len(rest), "AccumulateGrad", "T", shape=shape),
        output_shape=shape,
    )


def fires_on() -> RunLog:
    """An output of (32, 1) against a target of (32,)."""
    difference = node("Sub", 2, "Addmm", shape=(32, 32))
    return healthy(6, *(_squared(i, (32, 1), difference) for i in range(3)))


def silent_on() -> RunLog:
    """A pairwise ranking loss: every output minus every other one."""
    difference = node("Sub", 2, "Unsqueeze", "Unsqueeze", shape=(32, 32))
    wider = node("Unsqueeze", 3, "Addmm", shape=(32, 1))
    return healthy(6, *(_squared(i, (32,), difference, wider) for i in range(3)))

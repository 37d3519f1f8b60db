"""A softmax over the rows of the batch instead of the classes.

Looks at: softmax and log-softmax between the model's output and the loss that work along dimension 0 of a
tensor whose dimension 0 is the batch. Square matrices (similarities of a batch with itself, compared both
ways) and losses with a softmax along another dimension as well are silent. Limits: a softmax inside the model
is not seen unless it makes the output; sums and means do not tell their dimension.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softmax.html (the implicit
dimension is deprecated: it was 0 for three dimensions).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading, GraphNode, LossReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import batch, loss_graph, node
from gradguard.rules._graphs import CLASSES, output_node, output_shape
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG903",
    slug="wrong-dim",
    family="loss",
    severity=Severity.ERROR,
    summary="A softmax runs over the batch: the scores of one sample depend on the others.",
    remedy="Use dim=-1 (the classes), or cross_entropy on the raw output.",
    needs=(Sight.LOSS_GRAPH,),
    explains=("GG306", "GG901", "GG910"),
)

_NAMES = frozenset(("Softmax", "LogSoftmax"))


def check(run: Evidence, *, readings: int = 2) -> Iterator[Finding]:
    """Report every loss with a softmax over dimension 0 of a batch, by name."""
    rows, given = _rows(run, "targets"), _rows(run, "inputs")
    found: dict[str, list[tuple[int, GraphNode]]] = {}
    for reading in run.of(LossReading):
        wrong = _over_rows(reading, rows.get(reading.step) or given.get(reading.step))
        if wrong is not None:
            found.setdefault(reading.name, []).append((reading.step, wrong))
    for name, several in found.items():
        if len(several) < readings:
            continue
        step, wrong = several[0]
        yield RULE.finding(
            f"{name!r}: {wrong.name} runs over dimension 0 of a tensor of shape {wrong.shape}: over the "
            f"{(wrong.shape or (0,))[0]} rows of the batch",
            place=name,
            first_step=step,
            last_step=several[-1][0],
            evidence={"dim": 0, "rows": (wrong.shape or (0,))[0]},
        )


def _rows(run: Evidence, tensor: str) -> dict[int, int]:
    """Return by step how many rows the batch has; the targets know it best: inputs may have time first."""
    return {
        one.step: one.shape[0]
        for one in run.of(BatchReading)
        if one.tensor == tensor and one.split == "train" and one.shape
    }


def _over_rows(reading: LossReading, rows: int | None) -> GraphNode | None:
    """Return the softmax over the batch, if there is one and all are."""
    last = output_node(reading)
    near = [one for one in reading.nodes if last is not None and one.depth <= last.depth]
    every = [one for one in near if one.name in _NAMES and one.dim is not None]
    wrong = [one for one in every if _is_wrong(one)]
    if not wrong or len(wrong) < len(every):
        return None
    first = wrong[0]
    size = (first.shape or (0,))[0]
    by_class = any(one.name in CLASSES and first.name in one.follows for one in reading.nodes)
    is_batch = size == rows if rows else by_class
    return first if is_batch and (output_shape(reading) or ())[:1] == (size,) else None


def _is_wrong(one: GraphNode) -> bool:
    shape, dim = one.shape or (), one.dim
    if len(shape) < 2 or dim is None or shape[0] < 2 or shape[1] < 2 or shape[0] == shape[1]:
        return False
    return dim % len(shape) == 0


def _entropy(number: int, dim: int, shape: tuple[int, int]) -> LossReading:
    return loss_graph(
        number,
        node("NllLoss", 0, "LogSoftmax", shape=(), reduction=1, ignore_index=-100),
        node("LogSoftmax", 1, "Addmm", shape=shape, dim=dim),
        node("Addmm", 2, "AccumulateGrad", "T", shape=shape),
        output_shape=shape,
    )


def fires_on() -> RunLog:
    """log_softmax(output, 0) of (32, 8) before nll_loss."""
    facts = [
        one for i in range(3) for one in (_entropy(i, 0, (32, 8)), batch(i), batch(i, "targets"))
    ]
    return healthy(6, *facts)


def silent_on() -> RunLog:
    """Similarities of a batch with itself, and a right log-softmax with a negative dimension."""
    square = [_entropy(i, 0, (32, 32)) for i in range(3)]
    right = [_entropy(i, -1, (32, 8)) for i in range(3, 6)]
    return healthy(6, *square, *right, *(batch(i) for i in range(6)))

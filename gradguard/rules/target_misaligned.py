"""Targets of a sequence model that are shifted by the wrong number of positions.

Looks at: integer targets of the inputs' shape: at how many positions they are the inputs moved by 0, 1, 2 or
-1 places. Next-token targets are the inputs moved by one. Reported are targets moved by two or back by one;
targets that are the inputs themselves and are compared as they are, position by position; and targets moved
by one already of which the loss leaves out the last position (moved twice). Losses that are computed inside
the model (which moves the targets itself) are silent, and so are sequences that repeat themselves. Limits: an
autoencoder of tokens has its inputs as targets rightly: ignore the rule then.

Sources: https://huggingface.co/docs/transformers/tasks/language_modeling (labels are shifted inside the
model).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading, LossReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import batch, loss_graph, node
from gradguard.rules._graphs import CLASSES
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG907",
    slug="target-misaligned",
    family="loss",
    severity=Severity.WARNING,
    summary="The targets are shifted against the predictions by the wrong number of positions.",
    remedy="For next-token prediction use targets = tokens[:, 1:] with inputs = tokens[:, :-1], and shift only "
    "once.",
    needs=(Sight.INPUTS, Sight.TARGETS, Sight.LOSS_GRAPH),
)

_WORDS = {
    "0": "are the inputs themselves: the model has to copy",
    "2": "are the inputs moved by two positions",
    "-1": "are the inputs moved back by one position: the model has seen them",
    "1": "are the inputs moved by one position, and the loss leaves out the last one: it moves them again",
}


def check(
    run: Evidence, *, match: float = 0.99, apart: float = 0.3, readings: int = 2
) -> Iterator[Finding]:
    """Report shifts that the targets of several batches have in common."""
    graphs = {one.step: one for one in run.of(LossReading) if one.name == "loss"}
    found: dict[str, list[BatchReading]] = {}
    for one in run.of(BatchReading):
        shift = _wrong_shift(one, graphs.get(one.step), match, apart)
        if shift is not None:
            found.setdefault(shift, []).append(one)
    for shift, several in found.items():
        if len({one.step for one in several}) >= readings:
            yield RULE.finding(
                f"the targets of {len(several)} batches {_WORDS[shift]}",
                place=several[0].tensor,
                first_step=several[0].step,
                last_step=several[-1].step,
                evidence={"shift": int(shift), "match": several[0].shift_match[shift]},
            )


def _wrong_shift(
    one: BatchReading, graph: LossReading | None, match: float, apart: float
) -> str | None:
    shifts = one.shift_match
    if one.tensor != "targets" or one.split != "train" or not shifts:
        return None
    best = max(shifts, key=lambda by: shifts[by])
    others = [value for by, value in shifts.items() if by != best]
    if shifts[best] < match or any(value > shifts[best] - apart for value in others):
        return None
    left_out = None if graph is None else _left_out(graph, one.shape)
    wanted = 1 if best == "1" else 0  # positions that the loss leaves out if the shift is wrong
    return best if left_out == wanted and best in _WORDS else None


def _left_out(graph: LossReading, shape: tuple[int, ...]) -> int | None:
    """Return how many positions of every sequence the cross entropy leaves out; None when not known."""
    scores = [one for one in graph.nodes if one.name == "LogSoftmax"]
    entropy = any(one.name in CLASSES for one in graph.nodes)
    if len(shape) != 2 or not entropy or len(scores) != 1 or len(scores[0].shape or ()) < 2:
        return None
    given = scores[0].shape or ()
    scored = prod(given) // max(1, given[1])  # cross_entropy has the classes in dimension 1
    return next((gap for gap in (0, 1, 2) if scored == shape[0] * (shape[1] - gap)), None)


def _tokens(number: int, shape: tuple[int, int], **shifts: float) -> BatchReading:
    low = {"-1": 0.02, "0": 0.02, "1": 0.02, "2": 0.02}
    given = {by.removeprefix("by_").replace("back", "-1"): share for by, share in shifts.items()}
    return batch(
        number, "targets", shape=shape, shift_match=low | given, rows=None, sorted_rows=None
    )


def _entropy(number: int, rows: int) -> LossReading:
    return loss_graph(
        number,
        node("NllLoss", 0, "LogSoftmax", shape=(), reduction=1, ignore_index=-100),
        node("LogSoftmax", 1, "View", shape=(rows, 100), dim=1),
        node("View", 2, "Addmm", shape=(rows, 100)),
        output_shape=(8, 16, 100),
    )


def fires_on() -> RunLog:
    """Targets that are the inputs themselves: nobody has shifted them."""
    facts = [
        one for i in range(3) for one in (batch(i), _tokens(i, (8, 16), by_0=1.0), _entropy(i, 128))
    ]
    return healthy(6, *facts)


def silent_on() -> RunLog:
    """Next-token targets; in later batches the inputs themselves, which the loss shifts."""
    once = [one for i in range(3) for one in (_tokens(i, (8, 16), by_1=1.0), _entropy(i, 128))]
    inside = [one for i in range(3, 6) for one in (_tokens(i, (8, 16), by_0=1.0), _entropy(i, 120))]
    return healthy(6, *once, *inside, *(batch(i) for i in range(6)))

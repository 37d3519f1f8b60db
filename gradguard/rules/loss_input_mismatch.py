"""A loss that is given probabilities where it expects logits, or the reverse.

Looks at: the operations between the model's output and the loss: softmax or sigmoid right before the
log-softmax of cross_entropy or before binary_cross_entropy_with_logits; nll_loss of values that are no
logarithms. Where the graph is hidden, at outputs whose rows all are probability vectors and go into a
log-softmax as they are. Limits: scaled scores (a temperature between the two) are left alone; a log-softmax
of a log-softmax changes nothing and is not reported; kl_div falls apart into plain products and is not
judged; a loss that is computed inside the model is not seen.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html (input: unnormalised
logits).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import LossReading, ModuleReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import loss_graph, module, node
from gradguard.rules._graphs import CLASSES, PRODUCTS, SAME_VALUES, origin
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG901",
    slug="loss-input-mismatch",
    family="loss",
    severity=Severity.ERROR,
    summary="The loss is given probabilities for logits, or the reverse.",
    remedy="cross_entropy and binary_cross_entropy_with_logits want the raw output (drop the softmax or "
    "sigmoid); nll_loss wants log_softmax.",
    needs=(Sight.LOSS_GRAPH,),
)

_BOUNDED = frozenset(("Softmax", "Sigmoid"))
_PLAIN = PRODUCTS | _BOUNDED | {"Relu", "Tanh", "LeakyRelu", "Gelu", "Silu", "Elu"}


def check(run: Evidence, *, readings: int = 2) -> Iterator[Finding]:
    """Report every loss that is given the wrong kind of values, by name."""
    sums = {
        one.step: one.rows_sum_to_one
        for one in run.of(ModuleReading)
        if one.module == "" and one.training and one.rows_sum_to_one is not None
    }
    found: dict[tuple[str, str], list[int]] = {}
    for reading in run.of(LossReading):
        for what in _mismatches(reading, sums.get(reading.step)):
            found.setdefault((reading.name, what), []).append(reading.step)
    told: set[str] = set()
    for (name, what), steps in found.items():
        if len(steps) < readings or name in told:
            continue
        told.add(name)
        yield RULE.finding(
            f"{name!r}: {what}",
            place=_place(run, what) or name,
            first_step=steps[0],
            last_step=steps[-1],
            evidence={"readings": len(steps)},
        )


def _mismatches(reading: LossReading, sums_to_one: float | None) -> Iterator[str]:
    for one in reading.nodes:
        made_by = origin(reading, one)
        if one.name == "LogSoftmax" and made_by & _BOUNDED:
            yield f"a log-softmax (cross_entropy) is given the output of a {_first(made_by)}"
        elif one.name == "BinaryCrossEntropyWithLogits" and made_by & _BOUNDED:
            yield f"binary_cross_entropy_with_logits is given the output of a {_first(made_by)}"
        elif one.name in CLASSES and made_by and made_by <= _PLAIN:
            yield f"nll_loss is given the output of {_first(made_by, 'a weight product')}: no logarithms"
        elif one.name == "LogSoftmax" and sums_to_one == 1.0 and _is_output(reading, one.depth):
            yield "a log-softmax (cross_entropy) is given rows that are probabilities already (softmax)"


def _is_output(reading: LossReading, depth: int) -> bool:
    """Whether the model's output reaches this depth as it is."""
    between = [one for one in reading.nodes[:-1] if one.depth > depth]
    return reading.output_shape is not None and all(one.name in SAME_VALUES for one in between)


def _first(names: frozenset[str], other: str = "") -> str:
    known = sorted(names & _BOUNDED)
    return known[0].lower() if known else other


def _place(run: Evidence, what: str) -> str | None:
    """Return the last module of that kind, which is the one to remove."""
    modules = run.setup.modules if run.setup else ()
    for one in reversed(modules):
        if one.kind in _BOUNDED and one.kind.lower() in what:
            return one.name or None
    return None


def _entropy(number: int, of: str) -> LossReading:
    return loss_graph(
        number,
        node("NllLoss", 0, "LogSoftmax", shape=(), reduction=1, ignore_index=-100),
        node("LogSoftmax", 1, of, shape=(32, 8), dim=1),
        node(of, 2, "Addmm", shape=(32, 8)),
    )


def fires_on() -> RunLog:
    """The model ends in a softmax, and the loss is cross_entropy."""
    outputs = [module(i, rows_sum_to_one=1.0) for i in range(3)]
    return healthy(6, *(_entropy(i, "Softmax") for i in range(3)), *outputs)


def silent_on() -> RunLog:
    """Logits that are bounded and scaled, and a softmax whose logarithm goes into nll_loss."""
    bounded = [_entropy(i, "Mul") for i in range(3)]
    by_hand = [
        loss_graph(
            i,
            node("NllLoss", 0, "Log", shape=(), reduction=1, ignore_index=-100),
            node("Log", 1, "Softmax", shape=(32, 8)),
            node("Softmax", 2, "Addmm", shape=(32, 8), dim=1),
            name="term:class",
        )
        for i in range(3)
    ]
    return healthy(6, *bounded, *by_hand, *(module(i, rows_sum_to_one=1.0) for i in (3, 4)))

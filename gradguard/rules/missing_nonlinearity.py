"""A network of several linear layers with nothing between them.

Looks at: the operations in the graph of the loss: several weight products, and no operation that bends
anything besides those of the loss itself; and two linear layers of which the second is given what the first
one makes, and between which nothing is narrow. One layer could replace both. Frozen layers (adapters beside
them), low-rank factors, projections, attention and normalisation are silent. Limits: a deep linear network
that is meant to be one looks the same; convolutions are not judged, and neither are two layers that narrow
only a little.

Sources: https://cs231n.github.io/neural-networks-1/ (the non-linearity is critical).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import isclose

from gradguard.evidence import Evidence
from gradguard.facts import LossReading, ModuleFacts, ModuleReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import layer, loss_graph, module, node
from gradguard.rules._graphs import bending, output_node
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG911",
    slug="missing-nonlinearity",
    family="loss",
    severity=Severity.WARNING,
    summary="Several linear layers follow one another with nothing between them: together they are one.",
    remedy="Put an activation (nn.ReLU, nn.GELU) between the layers.",
    needs=(Sight.LOSS_GRAPH, Sight.SETUP, Sight.MODULES),
)

_STRAIGHT = frozenset(("Linear", "Flatten", "Unflatten", "Identity", "Dropout"))


def check(run: Evidence, *, readings: int = 2, layers: int = 2) -> Iterator[Finding]:
    """Report a model without any nonlinear operation and with a pair of linear layers in a row."""
    graphs = [one for one in run.of(LossReading) if one.name == "loss" and one.requires_grad]
    if len(graphs) < readings or not all(_is_linear(one, layers) for one in graphs):
        return
    pair = _pair(run)
    if pair is not None:
        yield RULE.finding(
            f"{graphs[0].linear_layers} weight products and nothing nonlinear between them: {pair[0].name} is "
            f"followed by {pair[1].name}",
            place=pair[0].name,
            first_step=graphs[0].step,
            last_step=graphs[-1].step,
            evidence={"linear_layers": graphs[0].linear_layers or 0, "nonlinearities": 0},
        )


def _is_linear(graph: LossReading, layers: int) -> bool:
    """Whether all bending operations of the graph are those of the loss."""
    known = graph.linear_layers is not None and graph.nonlinearities is not None
    if not known or graph.opaque or output_node(graph) is None or len(graph.nodes) >= 64:
        return False
    own = graph.nonlinearities == bending(graph)
    return own and (graph.linear_layers or 0) >= layers


def _pair(run: Evidence) -> tuple[ModuleFacts, ModuleFacts] | None:
    """Return two linear layers in a row that could be one; None if the model may be meant as it is."""
    modules = run.setup.modules if run.setup else ()
    if any(not one.trainable for one in run.parameters.values()):
        return None
    parents = {one.name.rpartition(".")[0] for one in modules if one.name}
    leaves = [one for one in modules if one.name and one.name not in parents]
    if any(one.kind not in _STRAIGHT for one in leaves):
        return None
    readings = [one for one in run.of(ModuleReading) if one.training]
    linear = [one for one in leaves if one.kind == "Linear"]
    for pair in pairwise(linear):
        if _is_redundant(*pair) and _is_handed_on(readings, *pair):
            return pair
    return None


def _is_handed_on(readings: list[ModuleReading], first: ModuleFacts, second: ModuleFacts) -> bool:
    """Whether the second layer is given what the first one makes, or dropout of it: no product, no gate."""
    made = {one.step: one for one in readings if one.module == first.name}
    given = {one.step: one for one in readings if one.module == second.name}
    between = {(one.step, one.output_rms) for one in readings if "Dropout" in one.kind}
    both = [(made[step], given[step]) for step in made.keys() & given.keys()]
    return bool(both) and all(
        _is_close(out.output_rms, into.input_rms) or (into.step, into.input_rms) in between
        for out, into in both
    )


def _is_close(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and isclose(one, other, rel_tol=1e-6)


def _is_redundant(first: ModuleFacts, second: ModuleFacts) -> bool:
    width, inner = first.settings.get("out_features"), second.settings.get("in_features")
    start, end = first.settings.get("in_features"), second.settings.get("out_features")
    if width is None or inner != width or start is None or end is None:
        return False
    return width >= max(start, end) or width >= 2 * min(start, end)


def _squares(number: int) -> LossReading:
    return loss_graph(
        number,
        node("MseLoss", 0, "Addmm", shape=(), reduction=1),
        node("Addmm", 1, "AccumulateGrad", "Addmm", "T", shape=(32, 1)),
        output_shape=(32, 1),
        linear_layers=2,
        nonlinearities=1,
    )


def _network(hidden: float) -> RunLog:
    modules = (
        layer("first", "Linear", in_features=8.0, out_features=hidden),
        layer("last", "Linear", in_features=hidden, out_features=8.0),
    )
    readings = [module(i, one.name, one.kind) for i in range(3) for one in modules]
    graphs = map(_squares, range(3))
    return run([step(i) for i in range(4)], setup(modules=modules), *graphs, *readings)


def fires_on() -> RunLog:
    """Two linear layers in a row, and the loss."""
    return _network(32.0)


def silent_on() -> RunLog:
    """A linear autoencoder: two factors of low rank."""
    return _network(2.0)

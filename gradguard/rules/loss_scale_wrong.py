"""A loss that is a sum over the batch, where that makes the steps too large.

Looks at: the last operation of the loss: a loss function with reduction="sum", or a sum over the rows, which
nothing divides again. A sum is right in many models and harmless under optimizers that are blind to scale, so
it is reported only together with its damage: a diverging loss after steps as large as the weights, or
clipping that takes away nearly everything. Limits: a mean where a sum was meant is not seen; a division by
the number of rows that happens before the sum is not told from a right one.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.MSELoss.html (reduction).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import LossReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules import clip_too_tight, learning_rate_too_high
from gradguard.rules._facts import loss_graph, node
from gradguard.rules._graphs import below, head, output_shape
from gradguard.rules._runs import drift, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG904",
    slug="loss-scale-wrong",
    family="loss",
    severity=Severity.ERROR,
    summary="The loss is a sum over the batch: the gradient grows with the number of rows.",
    remedy='Use reduction="mean" (or divide by the number of rows), or a learning rate for the sum.',
    needs=(Sight.LOSS_GRAPH, Sight.STEPS, Sight.LOSS),
    explains=("GG307", "GG601", "GG602", "GG604", "GG608", "GG704"),
)

_SUM = 2


def check(run: Evidence, *, rows: int = 4) -> Iterator[Finding]:
    """Report the optimised loss if it is a sum over at least ``rows`` rows and does damage."""
    sums = [one for one in run.of(LossReading) if one.name == "loss" and _rows(one) >= rows]
    if len(sums) < 2:
        return
    damage = [*learning_rate_too_high.check(run), *clip_too_tight.check(run)]
    if not damage:
        return
    worst = min(damage, key=lambda one: one.first_step or 0)
    yield RULE.finding(
        f"the loss is a sum over {_rows(sums[0])} rows ({sums[0].nodes[0].name}); {worst.message}",
        place=sums[0].name,
        first_step=min(sums[0].step, worst.first_step or 0),
        last_step=worst.last_step,
        evidence={"rows": _rows(sums[0]), **worst.evidence},
    )


def _rows(reading: LossReading) -> int:
    """Return how many rows of the model's output the loss sums up at its end; 0 for no sum."""
    shape = output_shape(reading)
    if not reading.nodes or not shape:
        return 0
    last = reading.nodes[0]
    if last.reduction == _SUM:
        return shape[0]
    if last.name != "Sum" or last.shape != ():
        return 0
    given = [one.shape for one in below(reading, last)]
    summed = any(one and one[0] == shape[0] for one in given)
    divided = any(node.name in ("Div", "Mean") for node in head(reading))
    return shape[0] if summed and not divided else 0


def _squares(number: int) -> LossReading:
    return loss_graph(
        number,
        node("MseLoss", 0, "Addmm", shape=(), reduction=2),
        node("Addmm", 1, "AccumulateGrad", "T", shape=(32, 1)),
        output_shape=(32, 1),
    )


def fires_on() -> RunLog:
    """reduction="sum" with a learning rate made for the mean: the loss grows tenfold a step."""
    records = [step(i, loss=10.0**i, drift=drift(update=20.0)) for i in range(5)]
    return run(records, setup(), *(_squares(i) for i in range(3)))


def silent_on() -> RunLog:
    """The sum of an autoencoder's errors, with a learning rate that suits it."""
    return run([step(i, loss=900 * 0.98**i) for i in range(8)], setup(), *map(_squares, range(3)))

"""Dropout that drops nearly everything, or what it must not drop.

Looks at: the probability of every dropout layer that trains in train mode (a probability to keep was meant,
most likely), and outputs of the model that are the output of a dropout layer and are compared with the
targets as they are. Limits: torch.nn.functional.dropout is not seen, nor dropout that is active in
evaluations: sampling predictions is done so on purpose.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout.html (p is the probability to drop).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

from gradguard.evidence import Evidence
from gradguard.facts import LossReading, ModuleReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import layer, loss_graph, module
from gradguard.rules._graphs import CLASSES, PRODUCTS, REGRESSION, head
from gradguard.rules._modes import is_dropout, modes
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG803",
    slug="dropout-misused",
    family="mode",
    severity=Severity.WARNING,
    summary="Dropout has a wrong probability, or is active where it must not be.",
    remedy="p is the probability to drop a value: use 0.1 to 0.5, on hidden layers, and F.dropout(..., "
    "training=self.training).",
    needs=(Sight.SETUP,),
    explains=("GG306", "GG501", "GG502"),
)


def check(run: Evidence, *, p: float = 0.9, readings: int = 2) -> Iterator[Finding]:
    """Report such probabilities, and predictions that are dropped."""
    yield from _probabilities(run, p)
    yield from _predictions(run, readings)


def _probabilities(run: Evidence, limit: float) -> Iterator[Finding]:
    asleep = {name for name, seen in modes(run).items() if True not in seen}
    for one in run.setup.modules if run.setup else ():
        p = one.settings.get("p", 0.0)
        if not is_dropout(one) or p < limit or not one.training or one.name in asleep:
            continue
        yield RULE.finding(
            f"{one.name} drops {p:.0%} of all values"
            f"{': nothing gets through it' if p == 1 else ' in training'}",
            place=one.name,
            first_step=run.setup.step if run.setup else None,
            evidence={"p": p},
            severity=Severity.ERROR if p == 1 else None,
        )


def _predictions(run: Evidence, least: int) -> Iterator[Finding]:
    """Report a dropout layer whose output is the model's and is compared with the targets as it is."""
    compared = {one.step for one in run.of(LossReading) if _is_compared(one)}
    readings = [one for one in run.of(ModuleReading) if one.step in compared and one.training]
    whole = {one.step: one for one in readings if one.module == ""}
    found: dict[str, list[ModuleReading]] = {}
    for one in readings:
        output = whole.get(one.step)
        if output is not None and "Dropout" in one.kind and _is_same(one, output):
            found.setdefault(one.module, []).append(one)
    for name, several in found.items():
        if len(several) >= least:
            yield RULE.finding(
                f"{name} drops values of the model's output, which the loss compares with the targets",
                place=name,
                first_step=several[0].step,
                last_step=several[-1].step,
                evidence={"zero_fraction": several[0].zero_fraction or 0.0},
            )


def _is_compared(reading: LossReading) -> bool:
    names = {node.name for node in head(reading)}
    return not names & PRODUCTS and not names.isdisjoint(CLASSES | REGRESSION)


def _is_same(one: ModuleReading, output: ModuleReading) -> bool:
    """Whether two outputs are one tensor: their statistics are equal to the last bit, and no accident."""
    drops = one.zero_fraction is not None and one.zero_fraction > 0
    rms = one.output_rms
    if not drops or rms is None or not isfinite(rms) or rms == 0:
        return False
    mine = (rms, one.output_max, one.output_min, one.zero_fraction, one.output_row_std)
    return mine == (
        output.output_rms,
        output.output_max,
        output.output_min,
        output.zero_fraction,
        output.output_row_std,
    )


def fires_on() -> RunLog:
    """A probability to keep of 0.9 was meant."""
    return run([step(i) for i in range(4)], setup(modules=(layer("drop", "Dropout", p=0.9),)))


def silent_on() -> RunLog:
    """Strong dropout on a hidden layer, and one that is never in train mode."""
    layers = (
        layer("drop", "Dropout", p=0.5),
        layer("teacher.drop", "Dropout", p=0.95, training=False),
    )
    dropped = [module(i, "drop", "Dropout", zero_fraction=0.5, output_rms=1.4) for i in range(3)]
    asleep = [module(i, "teacher.drop", "Dropout", training=False) for i in range(3)]
    rest = [one for i in range(3) for one in (module(i), loss_graph(i))]
    return run([step(i) for i in range(4)], setup(modules=layers), *dropped, *asleep, *rest)

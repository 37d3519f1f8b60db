"""Outputs that become the same for every input.

Looks at: the spread of the model's output over the rows of a batch, relative to its size, in training
forwards whose inputs do vary. It must have been ordinary at first and be next to nothing later. Outputs that
are 0 (a head that begins at zero) or constant from the start are silent, and so are constant targets. Limits:
a collapse to a few dimensions, or onto a few points, is not seen.

Sources: X. Chen and K. He, "Exploring simple Siamese representation learning", 2021 (collapsing).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading, LossReading, ModuleReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import module
from gradguard.rules._graphs import head
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG910",
    slug="representation-collapse",
    family="loss",
    severity=Severity.WARNING,
    summary="The output has become the same for every input.",
    remedy="Look for units that have died, a learning rate that is too large, and a loss whose optimum is a "
    "constant (no negatives, no stop-gradient, no variance term).",
    needs=(Sight.MODULES,),
)

_PAIRS = frozenset(("Sub", "Mul", "MseLoss", "L1Loss", "SmoothL1Loss", "CosineSimilarity"))


def check(
    run: Evidence,
    *,
    spread: float = 1e-3,
    fall: float = 0.02,
    paired_spread: float = 0.05,
    paired_fall: float = 0.1,
    readings: int = 2,
) -> Iterator[Finding]:
    """Report an output whose rows have come together while those of the inputs have not."""
    seen = [one for one in run.of(ModuleReading) if _is_measured(one)]
    if len(seen) <= readings:
        return
    # Outputs that are compared with each other have a trivial optimum: less is needed to suspect it.
    most, least = (paired_spread, paired_fall) if _is_paired(run) else (spread, fall)
    first = seen[0]
    collapsed = [one for one in seen[1:] if _spread(one) < most and _fall(one, first) < least]
    # It lasts: an output that is alike for a moment is no collapse.
    if len(collapsed) < readings or collapsed[-1] is not seen[-1] or _has_one_target(run):
        return
    last = collapsed[-1]
    yield RULE.finding(
        f"the rows of the model's output differ by {_spread(last):.2g} of their size at step {last.step} "
        f"({_spread(first):.2g} at step {first.step}), although the inputs vary",
        place=last.kind,
        first_step=collapsed[0].step,
        last_step=last.step,
        evidence={"spread": _spread(last), "first_spread": _spread(first)},
    )


def _is_paired(run: Evidence) -> bool:
    """Whether the loss compares outputs of the model with each other."""
    return any(
        one.name in _PAIRS and len(one.follows) > 1 for r in run.of(LossReading) for one in head(r)
    )


def _fall(one: ModuleReading, first: ModuleReading) -> float:
    """Return what is left of the first spread: in itself, and relative to the size."""
    size = (one.output_row_std or 0.0) / first.output_row_std if first.output_row_std else 1.0
    return max(size, _spread(one) / (_spread(first) or 1.0))


def _is_measured(one: ModuleReading) -> bool:
    if one.module != "" or not (one.training and one.grad) or not one.output_rms:
        return False
    spread, size = one.input_row_std, one.input_rms
    varied = spread is None or (bool(size) and spread > 0.05 * (size or 0.0))
    return varied and isfinite(one.output_rms) and one.output_row_std is not None


def _spread(one: ModuleReading) -> float:
    """Return the spread of the rows relative to the output's size; NaN stays NaN."""
    return (one.output_row_std or 0.0) / (one.output_rms or 1.0)


def _has_one_target(run: Evidence) -> bool:
    targets = [b for b in run.of(BatchReading) if b.tensor == "targets" and b.std is not None]
    return bool(targets) and all(
        (b.constant_features == 1.0) if b.constant_features is not None else b.std == 0.0
        for b in targets
    )


def _outputs(*spreads: float, rms: float = 1.0) -> RunLog:
    steps = (0, 1, 2, 50, 100, 150)
    facts = [
        module(number, output_row_std=spread * rms, output_rms=rms)
        for number, spread in zip(steps, spreads, strict=False)
    ]
    return healthy(160, *facts)


def fires_on() -> RunLog:
    """Two views of one image are pulled together, and nothing keeps other images apart."""
    return _outputs(0.8, 0.6, 0.5, 1e-5, 1e-6, 1e-7)


def silent_on() -> RunLog:
    """A detector whose bias makes its first outputs alike, and outputs that vary less and less."""
    return _outputs(0.002, 0.003, 0.01, 0.3, 0.1, 0.05, rms=4.6)

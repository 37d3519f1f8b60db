"""Inputs whose differences a cast to half precision has rounded away.

Looks at: inputs in float16 or bfloat16 (or float32 ones that a linear or convolution layer is given as they
are under autocast): how many numbers of that type lie between the smallest and the largest value. A few mean
that distinct inputs have become equal. Whole numbers of the loader (time steps, ids) that the model is given
as half are compared with the largest one up to which the type holds every whole number. Limits: the range is
over all features, so that one feature of a large offset hides among others.

Sources: https://docs.pytorch.org/docs/stable/type_info.html (torch.finfo).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading, ModuleReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._batches import Layers, first_layers, inputs, weight_layers
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

BITS: Mapping[str, int] = {"float16": 10, "bfloat16": 7}
"""Bits of the fraction, without the leading one."""

RULE = Rule(
    code="GG204",
    slug="low-precision-input",
    family="precision",
    severity=Severity.WARNING,
    summary="A cast to a low-precision type makes distinct inputs equal.",
    remedy="Subtract the offset (standardise) in float32 before the cast, and keep ids, positions and "
    "times in integers or float32.",
    needs=(Sight.INPUTS,),
    explains=("GG1001", "GG1003", "GG1006"),
)


def check(run: Evidence, *, levels: float = 8.0, batches: int = 2) -> Iterator[Finding]:
    """Report every tensor of the inputs that half precision cannot hold in two batches or more."""
    autocast = {r.step: r.window.autocast for r in run.steps if r.window and r.window.autocast}
    layers = weight_layers(run) if autocast else {}
    found: dict[str, list[tuple[BatchReading, str, float]]] = {}
    whole = _whole_numbers(run)
    for batch in run.of(BatchReading):
        if not batch.tensor.startswith("inputs") or batch.split != "train":
            continue
        kind = _kind(layers, batch, autocast.get(batch.step))
        left = _levels(batch, kind)
        if kind is None or left is None:
            continue
        origin = whole.get((batch.step, batch.tensor, batch.shape))
        cast = origin is not None and _largest(origin) > 2.0 ** (BITS[kind] + 1)
        if 0 < left <= levels or (cast and batch.dtype in BITS):
            found.setdefault(batch.tensor, []).append((batch, kind, left))
    for tensor, several in found.items():
        first, kind, left = several[0]
        if len({batch.step for batch, _, _ in several}) >= batches:
            yield RULE.finding(
                f"{tensor} reach the model in {kind}, which has {left:.0f} steps between their smallest "
                f"value {first.minimum:g} and their largest {first.maximum:g}: distinct values are equal",
                place=tensor,
                first_step=first.step,
                last_step=several[-1][0].step,
                evidence={"levels": left, "largest": _largest(first), "batches": len(several)},
            )


def _kind(layers: Layers, batch: BatchReading, autocast: str | None) -> str | None:
    """Return the half type that the values are cast to; None for none."""
    if batch.dtype in BITS:
        return batch.dtype
    under = autocast in BITS and batch.dtype in {"float32", "float64"}
    return autocast if under and any(first_layers(layers, batch)) else None


def _levels(batch: BatchReading, kind: str | None) -> float | None:
    """Return how many steps of the type lie between the extremes; None when not known."""
    low, high = batch.minimum, batch.maximum
    if kind is None or low is None or high is None or math.prod(batch.shape) < 8:
        return None
    largest = _largest(batch)
    if not math.isfinite(largest) or largest == 0.0:
        return None
    return float((high - low) / 2.0 ** (math.floor(math.log2(largest)) - BITS[kind]))


def _largest(batch: BatchReading) -> float:
    return max(abs(batch.minimum or 0.0), abs(batch.maximum or 0.0))


def _whole_numbers(run: Evidence) -> dict[tuple[int, str, tuple[int, ...]], BatchReading]:
    """Return the loader's ids and time steps; images and samples of sound are no ids."""
    return {
        (b.step, b.tensor, b.shape): b
        for b in run.of(BatchReading)
        if b.source == "loader" and b.dtype in {"int32", "int64"} and len(b.shape) <= 2
    }


def _years(number: int, dtype: str) -> BatchReading:
    values = {"minimum": 2000.0, "maximum": 2024.0, "mean": 2012.0, "std": 7.0}
    return inputs(number, source="forward", dtype=dtype, **values)


def fires_on() -> RunLog:
    """Years in bfloat16: 2000 to 2024 are four numbers."""
    return healthy(6, *(_years(i, "bfloat16") for i in range(3)))


def silent_on() -> RunLog:
    """Normalised inputs in bfloat16, and years in float32 that are normalised under autocast."""
    layers = [ModuleReading(step=i, module="first", kind="Linear", input_rms=1.0) for i in range(3)]
    halves = [inputs(i, dtype="bfloat16") for i in range(3)]
    years = [_years(i, "float32") for i in range(3)]
    return healthy(6, *halves, *years, *layers, window={"autocast": "bfloat16"})

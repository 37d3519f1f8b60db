"""Gradients that are rounded to zero in float16, for want of a loss scale.

Looks at: training forwards under float16 autocast without a loss scale that enlarges gradients, and parameters
whose gradient is exactly zero on the detailed steps while others live. The smallest float16 number is 6e-8;
what a loss divided by many positions passes back is soon smaller. Limits: a gradient that is partly rounded
to zero is not seen, nor float16 arithmetic outside of autocast.

Sources: https://arxiv.org/abs/1710.03740 (mixed precision training, loss scaling).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import PathState, StepRecord
from gradguard.rules._runs import NAMES, reading, readings, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG201",
    slug="gradient-underflow",
    family="precision",
    severity=Severity.ERROR,
    summary="Gradients are smaller than the smallest float16 number and become exactly zero.",
    remedy="Use torch.amp.GradScaler around backward() and step(), or bfloat16 autocast, which has the range "
    "of float32.",
    needs=(Sight.STEPS, Sight.FORWARDS),
    explains=("GG502", "GG306", "GG607"),
)


def check(run: Evidence, *, readings: int = 2, scale: float = 2.0) -> Iterator[Finding]:
    """Report optimizers with zero gradients on detailed steps under float16 autocast without a scale."""
    for name, records in run.by_optimizer.items():
        seen = [r for r in records if r.parameters is not None and _is_unscaled_half(r, scale)]
        zero = [_zeros(record) for record in seen]
        always = set.intersection(*zero) if zero else set()
        if len(seen) < readings or not always:
            continue
        names = [one.name for one in seen[0].parameters or () if one.name in always]
        yield RULE.finding(
            f"{len(names)} gradient(s) of {name!r} are exactly zero under float16 autocast without a loss "
            f"scale, at all {len(seen)} detailed steps: {', '.join(names[:4])}",
            place=names[0],
            first_step=seen[0].step,
            last_step=seen[-1].step,
            evidence={"parameters": len(names), "readings": len(seen)},
        )


def _is_unscaled_half(record: StepRecord, scale: float) -> bool:
    half = record.window is not None and record.window.autocast == "float16"
    return half and (record.loss_scale_before is None or record.loss_scale_before < scale)


def _zeros(record: StepRecord) -> set[str]:
    return {one.name for one in record.parameters or () if one.path is PathState.ZERO}


def _half(path: PathState) -> RunLog:
    read = readings({n: reading(n, path=path) for n in NAMES[:2]})
    return run(
        [step(i, parameters=read, window={"autocast": "float16"}) for i in range(3)], setup()
    )


def fires_on() -> RunLog:
    """The first layer's gradient is below 6e-8, and nothing enlarges it."""
    return _half(PathState.ZERO)


def silent_on() -> RunLog:
    """Without a loss scale, and gradients that are large enough."""
    return _half(PathState.LIVE)

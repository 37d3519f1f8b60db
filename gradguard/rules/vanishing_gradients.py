"""Gradients that shrink by orders of magnitude on their way to the first layers.

Looks at: the root mean square gradient of every weight matrix on detailed steps, in the order of the
parameters. The first one is a hundred-thousandth of the last one, and those between them follow. Limits: the
order of the parameters stands for depth; embeddings and weights that began as zeros are left out; gradients
that vanish through time in one recurrent weight are not seen, and optimizers that are blind to scale (Adam)
suffer less.

Sources: https://proceedings.mlr.press/v9/glorot10a.html.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import ParameterReading
from gradguard.rules._depth import slopes
from gradguard.rules._runs import parameter, reading, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG607",
    slug="vanishing-gradients",
    family="numerics",
    severity=Severity.WARNING,
    summary="Gradients shrink by orders of magnitude towards the input.",
    remedy="Use residual connections, normalisation layers or an initialisation that keeps the variance, and "
    "replace activations that saturate (sigmoid, tanh) by ReLU or GELU.",
    needs=(Sight.STEPS, Sight.SETUP),
)


def check(
    run: Evidence, *, readings: int = 2, ratio: float = 1e-5, matrices: int = 4
) -> Iterator[Finding]:
    """Report a model whose first weight has hardly any gradient, on several detailed steps."""
    low = [slope for slope in slopes(run, matrices=matrices) if slope.ratio < ratio]
    if len(low) >= readings:
        first = low[0]
        yield RULE.finding(
            f"at step {first.step} the gradient of {first.first_name} is {first.ratio:.2g} of that of "
            f"{first.last_name} (root mean squares, {first.matrices} weight matrices)",
            place=first.first_name,
            first_step=first.step,
            last_step=low[-1].step,
            evidence={"ratio": first.ratio, "readings": len(low), "matrices": first.matrices},
        )


_LAYERS = tuple(f"layers.{i}.weight" for i in range(8))


def _falling(factor: float) -> tuple[ParameterReading, ...]:
    """Readings of eight layers: every layer's gradient is ``factor`` times that of the next one."""
    return tuple(
        reading(name, gradient_norm=factor ** (len(_LAYERS) - 1 - i))
        for i, name in enumerate(_LAYERS)
    )


def fires_on() -> RunLog:
    """Eight sigmoid layers, a tenth of the gradient is left by each."""
    records = [step(i, parameters=_falling(0.1) if i < 3 else None) for i in range(6)]
    return run(records, setup(parameters=[parameter(name) for name in _LAYERS]))


def silent_on() -> RunLog:
    """Eight layers that take a third each: deep and small, and it trains."""
    records = [step(i, parameters=_falling(0.33) if i < 3 else None) for i in range(6)]
    return run(records, setup(parameters=[parameter(name) for name in _LAYERS]))

"""Initial weights on a scale at which signals explode or vanish.

Looks at: the root mean square of every weight of a linear or convolution layer at attach, beside
1 / sqrt(fan-in), which keeps the variance of the signal. More than 100 times that is reported for every such
weight; less than a thousandth only when half of all weights are so small, because single layers that begin near
zero (last layers of residual branches, policy heads) are made so on purpose. Embeddings, normalisation, tied
and frozen weights are not judged. Limits: a single layer that is too small by mistake is not seen.

Sources: https://docs.pytorch.org/docs/stable/nn.init.html.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ParameterFacts
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import NAMES, parameter, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1104",
    slug="bad-init-scale",
    family="init",
    severity=Severity.WARNING,
    summary="The initial weights are orders of magnitude too large or too small.",
    remedy="Initialise with nn.init.kaiming_uniform_ or xavier_uniform_ (a standard deviation of about "
    "1 / sqrt(fan-in)).",
    needs=(Sight.SETUP,),
    explains=("GG306", "GG607", "GG608"),
)

_KINDS = ("Linear", "Conv")


def check(run: Evidence, *, large: float = 100.0, small: float = 1e-3) -> Iterator[Finding]:
    """Report weights that are far too large, and all far too small ones where these are the rule."""
    scales = {one.name: _scale(one) for one in run.parameters.values() if _is_judged(one)}
    tiny = [name for name, scale in scales.items() if scale < small]
    for name in (name for name, scale in scales.items() if scale > large):
        yield _finding(run, name, scales[name], 1)
    if len(tiny) >= 2 and 2 * len(tiny) >= len(scales):  # one finding: it is one mistake
        yield _finding(run, tiny[0], scales[tiny[0]], len(tiny))


def _finding(run: Evidence, name: str, scale: float, count: int) -> Finding:
    others = f" (and {count - 1} more like it)" if count > 1 else ""
    return RULE.finding(
        f"the weights of {name}{others} begin at {scale:.3g} times 1 / sqrt(fan-in)",
        place=name,
        first_step=run.setup.step if run.setup else None,
        evidence={"scale": scale, "weights": count, "rms": run.parameters[name].rms or 0.0},
    )


def _is_judged(one: ParameterFacts) -> bool:
    usable = one.rms is not None and math.isfinite(one.rms) and one.rms > 0
    plain = one.module_kind.startswith(_KINDS) and "Transpose" not in one.module_kind
    return one.trainable and len(one.shape) >= 2 and usable and plain and not one.tied_to


def _scale(one: ParameterFacts) -> float:
    """Root mean square times the root of the fan-in: about 0.6 with torch's own initialisation."""
    return (one.rms or 0.0) * math.sqrt(max(1, math.prod(one.shape[1:])))


def fires_on() -> RunLog:
    """The weights of the first layer are drawn with a standard deviation of 100."""
    wide = [
        parameter(n, **({"rms": 100.0, "max_abs": 300.0} if n == NAMES[0] else {})) for n in NAMES
    ]
    return run([step(i) for i in range(4)], setup(parameters=wide))


def silent_on() -> RunLog:
    """A large embedding, and a policy head that begins near zero."""
    table = parameter("table.weight", module_kind="Embedding", shape=(1000, 8), rms=50.0)
    head = parameter("head.weight", rms=1e-5, max_abs=3e-5)
    return run([step(i) for i in range(4)], setup(parameters=[table, *map(parameter, NAMES), head]))

"""Two matrices with equal values that are not one tensor.

Looks at: the values of all matrices when watching begins. Weights that were tied and then loaded, copied or
moved apart begin equal, and drift away from each other with the first step. Limits: layers that are cloned
from one on purpose (nn.Transformer's) begin equal as well; matrices of the same name in sibling modules are
therefore left out.

Sources: https://docs.pytorch.org/docs/stable/notes/serialization.html (shared tensors).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import parameter, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1403",
    slug="tie-broken",
    family="checkpoint",
    severity=Severity.WARNING,
    summary="Two parameters that look like one tied tensor are two tensors.",
    remedy="Tie them again after loading or moving: b.weight = a.weight.",
    needs=(Sight.SETUP,),
)


def check(run: Evidence) -> Iterator[Finding]:
    """Report trainable matrices that equal another one with another last name or module kind."""
    known = run.parameters
    for one in known.values():
        twin = known.get(one.equal_to or "")
        if (
            twin is None
            or not (one.trainable or twin.trainable)
            or one.module_kind == twin.module_kind
        ):
            continue
        yield RULE.finding(
            f"{one.name} and {twin.name} hold the same values and are two tensors",
            place=one.name,
            first_step=run.setup.step if run.setup else None,
            evidence={"values": math.prod(one.shape)},
        )


def fires_on() -> RunLog:
    """Embedding and output layer were tied before the checkpoint was loaded."""
    head = parameter("last.weight", equal_to="first.weight")
    table = parameter("first.weight", module_kind="Embedding")
    return run([step(i) for i in range(4)], setup(parameters=[table, head]))


def silent_on() -> RunLog:
    """Cloned layers of a transformer begin with equal weights."""
    clone = parameter("last.weight", equal_to="first.weight")
    return run([step(i) for i in range(4)], setup(parameters=[parameter("first.weight"), clone]))

"""A weight matrix all of whose rows are equal.

Looks at: the share of distinct rows of every trainable matrix when watching begins. Equal units get equal
gradients and stay equal: the layer is as wide as one unit. Limits: all-zero matrices are left out: a last
layer or an adapter begins at zero rightly.

Sources: https://www.deeplearningbook.org/contents/optimization.html (section 8.4, breaking symmetry).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import NAMES, parameter, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1101",
    slug="symmetric-init",
    family="init",
    severity=Severity.WARNING,
    summary="The units of a layer begin with identical weights and stay identical.",
    remedy="Initialise the weights at random (nn.init.kaiming_uniform_), not with a constant.",
    needs=(Sight.SETUP,),
)


def check(run: Evidence, *, rows: int = 4) -> Iterator[Finding]:
    """Report trainable matrices with a single distinct row that is not zero."""
    for one in run.setup.parameters if run.setup else ():
        count = min(256, one.shape[0]) if len(one.shape) >= 2 else 0
        if (
            count < rows
            or one.distinct_rows is None
            or not one.trainable
            or one.zero_fraction == 1.0
        ):
            continue
        if one.distinct_rows * count <= 1.5:
            yield RULE.finding(
                f"all {one.shape[0]} rows of {one.name} are equal: its units will stay equal",
                place=one.name,
                first_step=run.setup.step if run.setup else None,
                evidence={"rows": one.shape[0], "distinct": 1},
            )


def fires_on() -> RunLog:
    """Every weight of the first layer is 0.1."""
    same = [parameter(n, **({"distinct_rows": 1 / 8} if n == NAMES[0] else {})) for n in NAMES]
    return run([step(i) for i in range(4)], setup(parameters=same))


def silent_on() -> RunLog:
    """A zero-initialised last layer."""
    zero = {"distinct_rows": 1 / 8, "zero_fraction": 1.0, "rms": 0.0}
    last = [parameter(n, **(zero if n == NAMES[2] else {})) for n in NAMES]
    return run([step(i) for i in range(4)], setup(parameters=last))

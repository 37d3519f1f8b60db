"""Factors that are both zero and give each other a zero gradient for ever.

Looks at: trainable weights of two or more dimensions that were all zero at attach and whose gradient is
exactly zero on every detailed step. One zero factor is healthy (LoRA's second matrix, a zero-initialised last
layer): its partner is not zero, so its own gradient lives from the first step on. Limits: the two factors
are not traced to the same product; factors with fewer than two dimensions are left out.

Sources: https://arxiv.org/abs/2106.09685 (one of the two factors begins at zero, the other at random).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import PathState
from gradguard.rules._runs import NAMES, parameter, reading, readings, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG505",
    slug="zero-init-deadlock",
    family="gradient path",
    severity=Severity.ERROR,
    summary="Factors that are all zero keep each other's gradient at zero.",
    remedy="Initialise one of the two factors at random and leave only the other one at zero.",
    needs=(Sight.STEPS, Sight.SETUP),
    explains=("GG502",),
)


def check(run: Evidence, *, readings: int = 2, factors: int = 2) -> Iterator[Finding]:
    """Report all-zero weights whose gradient has been exactly zero all along, together."""
    zeros = {
        name
        for name, one in run.parameters.items()
        if one.trainable and len(one.shape) >= 2 and one.zero_fraction == 1.0
    }
    if len(zeros) < factors:
        return
    counts: dict[str, list[int]] = {}
    alive: set[str] = set()
    for record in run.detailed:
        for one in record.parameters or ():
            if one.name in zeros and one.path is PathState.ZERO:
                counts.setdefault(one.name, []).append(record.step)
            elif one.name in zeros and one.path is not PathState.NO_GRADIENT:
                alive.add(one.name)
    dead = {n: at for n, at in counts.items() if n not in alive and len(at) >= readings}
    if len(dead) >= factors:
        names, steps = list(dead), [number for at in dead.values() for number in at]
        yield RULE.finding(
            f"{', '.join(names[:4])} began as all zeros and their gradients have been exactly zero since step "
            f"{min(steps)}: each waits for another one to move",
            place=names[0],
            first_step=min(steps),
            last_step=max(steps),
            evidence={"parameters": len(names), "readings": min(len(at) for at in dead.values())},
        )


def fires_on() -> RunLog:
    """Both factors of a low-rank product are zero."""
    dead = {n: reading(n, path=PathState.ZERO) for n in NAMES if n.endswith("weight")}
    records = [step(i, parameters=readings(dead) if i < 3 else None) for i in range(6)]
    zero = [parameter(n, **(_ZERO if n in dead else {})) for n in NAMES]
    return run(records, setup(parameters=zero))


def silent_on() -> RunLog:
    """Zero-initialised second factors of two adapters: the gradients of these live at once."""
    records = [step(i, parameters=readings() if i < 3 else None) for i in range(6)]
    zero = [parameter(n, **(_ZERO if n.endswith("weight") else {})) for n in NAMES]
    return run(records, setup(parameters=zero))


_ZERO = {"rms": 0.0, "max_abs": 0.0, "zero_fraction": 1.0, "distinct_rows": 1 / 8}

"""Parameters that are in the graph and whose gradient is exactly zero.

Looks at: the reading per parameter on detailed steps: exactly zero at least twice and never live. A rounding,
a threshold, a saturated clamp, a product with zero or dead units stand in the way. Limits: an expert whose
gate is closed may look the same for a while; the first three steps are detailed. The operation is named when
a probe was armed.

Sources: https://docs.pytorch.org/docs/stable/notes/autograd.html (gradients for non-differentiable
functions).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import PathState
from gradguard.rules._probes import probe_of, where
from gradguard.rules._runs import NAMES, reading, readings, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG502",
    slug="zero-gradient-path",
    family="gradient path",
    severity=Severity.ERROR,
    summary="An operation whose derivative is zero blocks the gradient.",
    remedy="Find it with gg.locate_dead; replace round or threshold by a straight-through estimate, and "
    "look for dead units.",
    needs=(Sight.STEPS,),
    explains=("GG306",),
    asks=True,
)


def check(run: Evidence, *, readings: int = 3) -> Iterator[Finding]:
    """Report, by module, the parameters that read exactly zero on all detailed steps."""
    zero: dict[str, list[int]] = {}
    other: set[str] = set()
    for record in run.detailed:
        for one in record.parameters or ():
            if one.path is PathState.ZERO:
                zero.setdefault(one.name, []).append(record.step)
            elif one.path is not PathState.NO_GRADIENT:
                other.add(one.name)
    dead: dict[str, list[str]] = {}
    for name, steps in zero.items():
        if name not in other and len(steps) >= readings:
            dead.setdefault(name.rpartition(".")[0] or name, []).append(name)
    for module, names in dead.items():
        steps = zero[names[0]]
        yield RULE.finding(
            f"the gradient of {', '.join(names[:4])} has been exactly zero on all {len(steps)} detailed steps"
            f"{where(probe_of(run, 'dead', names))}",
            place=module,
            first_step=steps[0],
            last_step=steps[-1],
            evidence={"parameters": len(names), "readings": len(steps)},
        )


def fires_on() -> RunLog:
    """The first layer's gradient dies in a rounding."""
    dead = readings({n: reading(n, path=PathState.ZERO) for n in NAMES[:2]})
    return run([step(i, parameters=dead if i < 3 else None) for i in range(6)], setup())


def silent_on() -> RunLog:
    """LoRA: the first step of one factor is zero, because the other one begins at zero."""
    first = readings({NAMES[0]: reading(NAMES[0], path=PathState.ZERO)})
    rest = readings()
    return run([step(i, parameters=rest if i else first) for i in range(4)], setup())

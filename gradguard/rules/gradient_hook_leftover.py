"""A tensor hook that was left on a parameter whose gradient is dead or not finite.

Looks at: hooks on parameters that are not the guard's, together with what became of the gradient of the same
parameter: exactly zero or not finite on every detailed step, or never there. Hooks that scale, log or clip a
living gradient are healthy. Limits: a hook that alters a gradient and leaves it alive is not seen, nor one on
an activation, nor one that was registered after watching began.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.Tensor.register_hook.html.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gradguard.evidence import Evidence
from gradguard.facts import ParameterFacts
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import PathState
from gradguard.rules._runs import NAMES, parameter, reading, readings, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG504",
    slug="gradient-hook-leftover",
    family="gradient path",
    severity=Severity.ERROR,
    summary="A hook that was left on a parameter zeroes or breaks its gradient.",
    remedy="Keep the handle that register_hook returns and call its remove(), or freeze the parameter "
    "with requires_grad_(False) if it must not train.",
    needs=(Sight.STEPS, Sight.SETUP),
    explains=("GG501", "GG502", "GG601"),
)


def check(run: Evidence, *, readings: int = 2, steps: int = 3) -> Iterator[Finding]:
    """Report every hooked parameter whose gradient has never been alive."""
    hooked = {
        name: one for name, one in run.parameters.items() if one.foreign_hooks > 0 and one.trainable
    }
    found = _states(run, hooked) if hooked else {}
    for name, one in hooked.items():
        seen = _seen(found.get(name, [])) or _missing(run, name)
        if seen is None or any(state is PathState.LIVE for state, _ in found.get(name, [])):
            continue
        state, first, last, count = seen
        if count < (steps if state is PathState.NO_GRADIENT else readings):
            continue
        words = {PathState.ZERO: "exactly zero", PathState.NONFINITE: "not finite"}
        yield RULE.finding(
            f"{one.name} carries {one.foreign_hooks} hook(s) that are not the guard's, and its gradient is "
            f"{words.get(state, 'missing')} at all {count} steps looked at since step {first}",
            place=one.name,
            first_step=first,
            last_step=last,
            evidence={"hooks": one.foreign_hooks, "steps": count},
        )


def _states(
    run: Evidence, hooked: Mapping[str, ParameterFacts]
) -> dict[str, list[tuple[PathState, int]]]:
    """Return what was read of every hooked parameter on detailed steps, and when."""
    found: dict[str, list[tuple[PathState, int]]] = {}
    for record in run.detailed:
        for one in record.parameters or ():
            if one.name in hooked:
                found.setdefault(one.name, []).append((one.path, record.step))
    return found


def _seen(found: list[tuple[PathState, int]]) -> tuple[PathState, int, int, int] | None:
    """Return the one state a gradient ever had, with first and last step and how often; None for none."""
    present = [(state, number) for state, number in found if state is not PathState.NO_GRADIENT]
    states = {state for state, _ in present}
    if len(states) != 1:
        return None
    return present[0][0], present[0][1], present[-1][1], len(present)


def _missing(run: Evidence, name: str) -> tuple[PathState, int, int, int] | None:
    """Return the same for a parameter without a gradient in any attempt of its optimizer."""
    for records in run.by_optimizer.values():
        window = records[-1].window
        if window is not None and name in (window.never_gradient or ()):
            return PathState.NO_GRADIENT, records[0].step, records[-1].step, len(records)
    return None


def _hooked() -> list[ParameterFacts]:
    return [parameter(n, foreign_hooks=1 if n == NAMES[0] else 0) for n in NAMES]


def fires_on() -> RunLog:
    """A hook from an experiment multiplies the gradient of the first layer by 0."""
    dead = readings({NAMES[0]: reading(NAMES[0], path=PathState.ZERO)})
    records = [step(i, parameters=dead if i < 3 else None) for i in range(6)]
    return run(records, setup(parameters=_hooked()))


def silent_on() -> RunLog:
    """A hook that clips the gradient value by value; the gradient lives."""
    records = [step(i, parameters=readings() if i < 3 else None) for i in range(6)]
    return run(records, setup(parameters=_hooked()))

"""Parameters that do not require grad although they seem meant to train.

Looks at: which parameters are trainable when watching begins and whenever that changes. What is frozen from
the start is a note: backbones and adapters are frozen on purpose. An alarm is a parameter that the
optimizer holds, was trainable, and is switched off for good; and a layer of which one half is frozen while
layers of its kind train as a whole. Limits: a freeze that is meant in mid-run must be declared with
``Plan.frozen``; models that switch parts on and off in turn are not judged.

Sources: https://docs.pytorch.org/docs/stable/notes/autograd.html (setting requires_grad).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ParameterFacts, Plan, Setup
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import NAMES, parameter, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG304",
    slug="frozen-parameters",
    family="optimizer",
    severity=Severity.WARNING,
    summary="Parameters that seem meant to train do not require grad.",
    remedy="Set requires_grad_(True) again after the evaluation or the other model's turn; name what is "
    "frozen on purpose in Plan(frozen=...).",
    needs=(Sight.STEPS, Sight.SETUP),
)


def check(run: Evidence, *, steps: int = 3, minority: float = 0.25) -> Iterator[Finding]:
    """Report parameters switched off in mid-run, layers frozen by half, and note what else is frozen."""
    setups = run.of(Setup)
    if not setups:
        return
    prefixes = run.plan.frozen
    switched = _switched_off(setups, prefixes)
    if switched is not None and sum(r.step >= switched[1] for r in run.steps) >= steps:
        yield _found(
            switched[0], switched[1], "were trainable and are frozen since this step", None
        )
    frozen = [p for p in setups[0].parameters if not p.trainable and not _is_meant(p, prefixes)]
    halves = _halves(setups[0].parameters, frozen, minority)
    if halves:
        yield _found(
            halves, setups[0].step, "are frozen while the rest of their layer trains", None
        )
    elif frozen:
        yield _found(frozen, setups[0].step, "are frozen from the start", Severity.INFO)


def _found(
    parameters: list[ParameterFacts], step: int, what: str, severity: Severity | None
) -> Finding:
    names = ", ".join(p.name for p in parameters[:4])
    return RULE.finding(
        f"{len(parameters)} parameter(s) {what}: {names}",
        place=parameters[0].name
        if len(parameters) == 1
        else parameters[0].module or parameters[0].name,
        first_step=step,
        evidence={"parameters": len(parameters)},
        severity=severity,
    )


def _is_meant(one: ParameterFacts, prefixes: tuple[str, ...]) -> bool:
    return bool(prefixes) and one.name.startswith(prefixes)


def _switched_off(
    setups: tuple[Setup, ...], prefixes: tuple[str, ...]
) -> tuple[list[ParameterFacts], int] | None:
    """Return held parameters that went off and stayed off; None where anything was ever switched on."""
    off: list[ParameterFacts] = []
    since, trainable = 0, {p.name: p.trainable for p in setups[0].parameters}
    for around in setups[1:]:
        for one in around.parameters:
            was = trainable.get(one.name, one.trainable)
            if one.trainable and not was:
                return None
            if (
                was
                and not one.trainable
                and one.optimizer is not None
                and not _is_meant(one, prefixes)
            ):
                since = around.step if not off else since
                off.append(one)
            trainable[one.name] = one.trainable
    return (off, since) if off else None


def _halves(
    everything: tuple[ParameterFacts, ...], frozen: list[ParameterFacts], minority: float
) -> list[ParameterFacts]:
    """Return the frozen parameters of layers that are the exception among layers of their kind."""
    layers: dict[str, list[ParameterFacts]] = {}
    for one in everything:
        layers.setdefault(one.module, []).append(one)
    whole: dict[str, int] = {}
    for own in layers.values():
        if len(own) > 1 and all(p.trainable for p in own):
            whole[own[0].module_kind] = whole.get(own[0].module_kind, 0) + 1
    found = [p for p in frozen if any(other.trainable for other in layers[p.module])]
    count = len({p.module for p in found})
    kinds = {p.module_kind for p in found}
    return found if all(count <= minority * whole.get(kind, 0) for kind in kinds) else []


def fires_on() -> RunLog:
    """The first layer was frozen for an evaluation at step 3, and nobody switched it on again."""
    later = [parameter(n, trainable="first" not in n) for n in NAMES]
    return run([step(i) for i in range(8)], setup(), setup(step=3, parameters=later))


def silent_on() -> RunLog:
    """A backbone that is frozen as declared."""
    frozen = [
        parameter(n, **({"optimizer": None, "trainable": False} if "first" in n else {}))
        for n in NAMES
    ]
    return run([step(i) for i in range(8)], setup(parameters=frozen, plan=Plan(frozen=("first",))))

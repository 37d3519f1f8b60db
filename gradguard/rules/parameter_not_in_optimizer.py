"""Trainable parameters that no watched optimizer holds.

Looks at: the parameters of the model and the parameter groups, when watching begins and whenever they change.
Such a parameter gets gradients and never moves. Limits: an optimizer that is not watched may hold it; pass
all optimizers to ``watch``. Parameters named in ``Plan.frozen`` are left out.

Sources: https://github.com/pytorch/pytorch/issues/14467.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import Setup
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import NAMES, healthy, parameter, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG301",
    slug="parameter-not-in-optimizer",
    family="optimizer",
    severity=Severity.ERROR,
    summary="Trainable parameters are in no parameter group.",
    remedy="Make the optimizer from model.parameters() after the model is complete, or add the parameters with "
    "optimizer.add_param_group; set requires_grad_(False) on what must not train.",
    needs=(Sight.SETUP,),
    explains=(
        "GG501",
        "GG502",
    ),
)


def check(run: Evidence) -> Iterator[Finding]:
    """Report the parameters that were left out when watching began, by owning module."""
    first = run.setup
    for module, names in _left_out(first, run.plan.frozen).items():
        assert first is not None
        total = sum(one.trainable for one in first.parameters)
        place = names[0] if len(names) == 1 else module or names[0]
        yield RULE.finding(
            f"{len(names)} trainable parameter(s) of {place!r} are in no parameter group and never "
            f"move: {', '.join(names[:4])}",
            place=place,
            first_step=first.step,
            evidence={"parameters": len(names), "trainable": total},
        )


def _left_out(setup: Setup | None, frozen: tuple[str, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in setup.parameters if setup else ():
        if one.trainable and one.optimizer is None and not one.name.startswith(frozen or ("\0",)):
            found.setdefault(one.module, []).append(one.name)
    return found


def fires_on() -> RunLog:
    """The last layer was added after the optimizer was made."""
    lost = [parameter(n, **({"optimizer": None} if "last" in n else {})) for n in NAMES]
    return run([step(i) for i in range(4)], setup(parameters=lost))


def silent_on() -> RunLog:
    """Everything that is trainable is held; the backbone is frozen."""
    frozen = [
        parameter(n, **({"optimizer": None, "trainable": False} if "first" in n else {}))
        for n in NAMES
    ]
    return run(list(healthy(4)), setup(parameters=frozen))

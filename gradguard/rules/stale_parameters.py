"""An optimizer that updates tensors which no longer belong to the model.

Looks at: parameters of the optimizers that are not the model's but have the shape of one that no optimizer
holds. It happens when a layer is replaced, or the model copied or rebuilt, after the optimizer was made.
Limits: parameters of something else (a loss with weights of its own) that happen to have such a shape look
alike.

Sources: https://github.com/pytorch/pytorch/issues/149205, https://github.com/pytorch/examples/issues/1325.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import Setup
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import NAMES, parameter, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG302",
    slug="stale-parameters",
    family="optimizer",
    severity=Severity.ERROR,
    summary="The optimizer holds tensors that are not parameters of the model.",
    remedy="Make the optimizer after the last change of the model (replaced layers, deepcopy, to_empty, "
    "load_state_dict(assign=True)), from model.parameters().",
    needs=(Sight.SETUP,),
    explains=(
        "GG301",
        "GG501",
        "GG502",
        "GG702",
    ),
)


def check(run: Evidence) -> Iterator[Finding]:
    """Report every optimizer with stale parameters once."""
    reported: set[str] = set()
    for around in run.of(Setup):
        for name, count in around.foreign_same_shape.items():
            if count and name not in reported:
                reported.add(name)
                yield RULE.finding(
                    f"optimizer {name!r} holds {count} tensor(s) that do not belong to the model, with the "
                    "shapes of parameters that no optimizer holds: the model was changed after it was made",
                    place=name,
                    first_step=around.step,
                    evidence={"stale": count, "foreign": around.foreign.get(name, count)},
                )


def fires_on() -> RunLog:
    """The head was replaced."""
    lost = [parameter(n, **({"optimizer": None} if "last" in n else {})) for n in NAMES]
    two = {"optimizer": 2}
    return run(
        [step(i) for i in range(4)], setup(parameters=lost, foreign=two, foreign_same_shape=two)
    )


def silent_on() -> RunLog:
    """The optimizer also holds the weights of a learned loss."""
    return run([step(i) for i in range(4)], setup(foreign={"optimizer": 2}))

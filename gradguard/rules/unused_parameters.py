"""Parameters of modules that no forward pass has called.

Looks at: the trainable parameters that never had a gradient and whose module was never called in a forward
pass, as of the last attempt. An entry of a list of modules of which others were called (experts, heads,
layers that are dropped at random) is given ``turns`` attempts to have its turn. Limits: heads that are plain
attributes and are trained one phase after the other look unused until their phase begins; declare them with
``plan=Plan(frozen=...)``. Weights used by hand without calling their module are in use once they have a
gradient.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
(find_unused_parameters).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ModuleFacts
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import NAMES, parameter, run, setup, step
from gradguard.rules._unused import by_place, uncalled, waiting
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG506",
    slug="unused-parameters",
    family="gradient path",
    severity=Severity.WARNING,
    summary="Trainable parameters take part in no forward pass.",
    remedy="Call the module in forward, or remove it; freeze it if it is kept for later.",
    needs=(Sight.STEPS, Sight.FORWARDS),
)


def check(run: Evidence, *, steps: int = 3, turns: int = 100) -> Iterator[Finding]:
    """Report, by the largest module that is unused as a whole, the parameters never called."""
    for name, records in run.by_optimizer.items():
        unused = uncalled(records) if len(records) >= steps else frozenset()
        frozen = run.plan.frozen
        ours = [p for p in sorted(unused) if not p.startswith(frozen)]
        early = waiting(run, unused) if len(records) < turns else frozenset()
        ours = [p for p in ours if p not in early]
        for place, parameters in by_place(run, ours).items():
            yield RULE.finding(
                f"no forward pass has called {place} in {len(records)} steps of {name!r}: "
                f"{', '.join(parameters[:4])} cannot learn",
                place=place,
                first_step=records[0].step,
                last_step=records[-1].step,
                evidence={"parameters": len(parameters), "steps": len(records)},
            )


def _unused(number: int, *names: str) -> StepRecord:
    window = {"never_gradient": names, "uncalled": names, "without_gradient": len(names)}
    return step(number, window=window)


def fires_on() -> RunLog:
    """The first layer is never called."""
    return run([_unused(i, *NAMES[:2]) for i in range(5)], setup())


def silent_on() -> RunLog:
    """The second head of a list has its turn at step 5."""
    heads = [parameter(name) for name in ("heads.0.weight", "heads.1.weight")]
    modules = (ModuleFacts(name="heads", kind="ModuleList", training=True),)
    facts = setup(parameters=heads, modules=modules)
    return run([_unused(i, "heads.1.weight") for i in range(4)], facts)

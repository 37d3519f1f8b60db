"""Parameters that train in another group than the parts they belong with.

Looks at: the parameter groups of the watched optimizers beside ``Plan.groups``, which says by name prefix what
belongs together. Groups are often made by looking for a word in a name ("head"), and a part whose name lacks
that word lands in the other group, with the other learning rate. Limits: needs the declaration; a part that
is in no group at all is GG301.

Sources: https://docs.pytorch.org/docs/stable/optim.html (per-parameter options); a published run whose
classifier was called ``k_direct_mlp`` and trained at the backbone's rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ParameterFacts, Plan
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import NAMES, parameter, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG313",
    slug="wrong-parameter-group",
    family="optimizer",
    severity=Severity.WARNING,
    summary="Parameters are in another parameter group than the parts they belong with.",
    remedy="Choose the groups by module, not by a word in the name, and print the names in every group once.",
    needs=(Sight.SETUP, Sight.PLAN),
)

Home = tuple[str | None, int | None]


def check(run: Evidence) -> Iterator[Finding]:
    """Report parameters of a declared group that are not where most of that group is."""
    for name, prefixes in run.plan.groups.items():
        own = [one for one in run.parameters.values() if _is_held(one, prefixes)]
        homes = Counter(_home(one) for one in own)
        if len(homes) < 2:
            continue
        (home, most), *_ = homes.most_common()
        strays = [one for one in own if _home(one) != home]
        names = ", ".join(one.name for one in strays[:4])
        yield RULE.finding(
            f"{len(strays)} parameter(s) declared as {name!r} are in parameter group {strays[0].group} and not "
            f"with the other {most} in group {home[1]}: {names}",
            place=strays[0].module or strays[0].name,
            first_step=run.setup.step if run.setup else None,
            evidence={"strays": len(strays), "together": most},
        )


def _is_held(one: ParameterFacts, prefixes: tuple[str, ...]) -> bool:
    return one.optimizer is not None and one.name.startswith(tuple(prefixes))


def _home(one: ParameterFacts) -> Home:
    return one.optimizer, one.group


def _grouped(*groups: int) -> RunLog:
    parameters = [parameter(n, group=g) for n, g in zip(NAMES, groups, strict=True)]
    plan = Plan(groups={"head": tuple(NAMES[1:])})
    return run([step(i) for i in range(4)], setup(parameters=parameters, plan=plan))


def fires_on() -> RunLog:
    """One part of the head is in the backbone's group."""
    return _grouped(0, *(1 for _ in NAMES[2:]), 0)


def silent_on() -> RunLog:
    """The head is together."""
    return _grouped(0, *(1 for _ in NAMES[1:]))

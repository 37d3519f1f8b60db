"""Parameters that no gradient has ever reached although others have one.

Looks at: the trainable parameters of an optimizer that had no gradient in any attempt so far, without those
whose module was never called (GG506 reports them). Limits: a head or an expert that has not had its turn yet
looks the same until it has; judge at the end, or look with gg.explain_paths. The line that cuts the path is
named when a probe was armed.

Sources: https://github.com/pytorch/pytorch/issues/40983.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._probes import probe_of, where
from gradguard.rules._runs import run, setup, step
from gradguard.rules._unused import uncalled
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG501",
    slug="graph-cut",
    family="gradient path",
    severity=Severity.ERROR,
    summary="No gradient reaches these parameters: the path is cut, or they are not used.",
    remedy="Look for detach(), .data, .item(), torch.no_grad() or a re-wrapped tensor between these "
    "parameters and the loss.",
    needs=(Sight.STEPS,),
    explains=("GG306",),
    asks=True,
)


def check(run: Evidence, *, steps: int = 3) -> Iterator[Finding]:
    """Report, by module, the parameters without a gradient in at least three attempts."""
    for name, records in run.by_optimizer.items():
        known = [r.window.never_gradient for r in records if r.window is not None]
        last = next((one for one in reversed(known) if one is not None), ())
        if len(records) < steps or not last:
            continue
        unused = uncalled(records)
        modules: dict[str, list[str]] = {}
        for parameter in (one for one in last if one not in unused):
            modules.setdefault(parameter.rpartition(".")[0] or parameter, []).append(parameter)
        for module, parameters in modules.items():
            yield RULE.finding(
                f"no gradient has reached {', '.join(parameters[:4])} in {len(records)} steps of {name!r}"
                f"{where(probe_of(run, 'cut', parameters))}",
                place=module,
                first_step=records[0].step,
                last_step=records[-1].step,
                evidence={"parameters": len(parameters), "steps": len(records)},
            )


def fires_on() -> RunLog:
    """The first layer never gets a gradient."""
    cut = {"never_gradient": ("first.weight", "first.bias"), "without_gradient": 2}
    return run([step(i, window=cut) for i in range(5)], setup())


def silent_on() -> RunLog:
    """Two heads in turn: each had its gradient."""
    turns = [("first.weight", "first.bias"), (), (), ()]
    return run([step(i, window={"never_gradient": n}) for i, n in enumerate(turns)], setup())

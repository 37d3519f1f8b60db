"""Updates that vanish when they are added to low-precision weights.

Looks at: the share of values that changed in a taken step, for groups that hold bfloat16 or float16
parameters. An update below half a unit in the last place changes nothing. Limits: close to an optimum few
values move rightly, so the share must be small from the first steps.

Sources: https://github.com/pytorch/pytorch/issues/120376, https://arxiv.org/abs/2010.06192.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import NAMES, drift, parameter, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG202",
    slug="update-lost-to-rounding",
    family="precision",
    severity=Severity.WARNING,
    summary="Most updates are lost when they are rounded to the weights' precision.",
    remedy="Keep float32 weights and use autocast, or an optimizer with stochastic rounding; or raise the "
    "learning rate.",
    needs=(Sight.STEPS, Sight.SETUP),
    explains=("GG306",),
)


def check(run: Evidence, *, steps: int = 3, moved: float = 0.2) -> Iterator[Finding]:
    """Report groups of half precision of which few values move in the first steps."""
    half = {
        (p.optimizer, p.group): p.dtype
        for p in (run.setup.parameters if run.setup else ())
        if p.dtype in ("bfloat16", "float16") and p.trainable
    }
    for (name, index), dtype in half.items():
        records = run.by_optimizer.get(name or "", ())[: 4 * steps]
        shares = [
            (r.step, r.groups[index].moved_fraction)
            for r in records
            if index is not None
            and index < len(r.groups)
            and r.gradient_norm
            and _had_rate(r, index)
        ]
        if len(shares) >= steps and max(share for _, share in shares[:steps]) < moved:
            yield RULE.finding(
                f"only {shares[0][1]:.1%} of the {dtype} values of group {index} of {name!r} change in a "
                "step: the updates are smaller than the weights' precision",
                place=f"group {index}",
                first_step=shares[0][0],
                last_step=shares[-1][0],
                evidence={"moved_fraction": shares[0][1]},
            )


def _had_rate(record: StepRecord, group: int) -> bool:
    return group >= len(record.learning_rates) or record.learning_rates[group] > 0


def fires_on() -> RunLog:
    """bfloat16 weights of which 4 % change."""
    half = [parameter(n, dtype="bfloat16") for n in NAMES]
    few = drift("group 0", moved=0.04)
    return run([step(i, groups=(few,)) for i in range(5)], setup(parameters=half))


def silent_on() -> RunLog:
    """bfloat16 that is fine: nearly everything moves."""
    half = [parameter(n, dtype="bfloat16") for n in NAMES]
    most = drift("group 0", moved=0.86)
    return run([step(i, groups=(most,)) for i in range(5)], setup(parameters=half))

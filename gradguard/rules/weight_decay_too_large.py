"""Weight decay that takes the weights away faster than the gradient can build them.

Looks at: weight decay times learning rate for decoupled decay (AdamW): the share of every weight that one
step removes. For coupled decay (SGD, Adam): the decay's gradient beside the loss's. Limits: at an optimum the
two of a coupled decay are in balance, so they must differ by far, and from the beginning.

Sources: https://arxiv.org/abs/1711.05101 (decoupled weight decay).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._runs import group, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG308",
    slug="weight-decay-too-large",
    family="optimizer",
    severity=Severity.WARNING,
    summary="Weight decay dominates the update: the weights shrink away.",
    remedy="Lower weight_decay; 0.01 to 0.1 is usual for AdamW, 1e-4 for SGD.",
    needs=(Sight.STEPS, Sight.SETUP),
)


def check(run: Evidence, *, share: float = 0.01, dominance: float = 10.0) -> Iterator[Finding]:
    """Report groups whose decay takes more than a share of every weight at each step."""
    for one in run.setup.groups if run.setup else ():
        decay = one.settings.get("weight_decay", 0.0)
        records = run.by_optimizer.get(one.optimizer, ())[:8]
        taken = [r for r in records if r.outcome is StepOutcome.APPLIED]
        if decay <= 0 or len(taken) < 2:
            continue
        decoupled = one.kind == "AdamW" or one.settings.get("decoupled_weight_decay") == 1.0
        sizes = [_strength(r, one.index, decay, decoupled=decoupled) for r in taken]
        limit = share if decoupled else dominance
        if min(sizes) >= limit:
            what = (
                "of every weight is taken by each step"
                if decoupled
                else "times the loss's gradient"
            )
            yield RULE.finding(
                f"weight decay {decay:g} of group {one.index} of {one.optimizer!r} is too strong: "
                f"{min(sizes):.3g} {what}",
                place=f"group {one.index}",
                first_step=taken[0].step,
                last_step=taken[-1].step,
                evidence={"weight_decay": decay, "strength": min(sizes), "limit": limit},
            )


def _strength(record: StepRecord, group: int, decay: float, *, decoupled: bool) -> float:
    if decoupled:
        rates = record.learning_rates
        return rates[group] * decay if group < len(rates) else 0.0
    if group >= len(record.groups) or not record.gradient_norm:
        return 0.0
    return decay * record.groups[group].weight_norm / record.gradient_norm


def fires_on() -> RunLog:
    """AdamW with weight decay 100 at 1e-3: a tenth of every weight, every step."""
    return run([step(i) for i in range(5)], setup(groups=[group(weight_decay=100.0)]))


def silent_on() -> RunLog:
    """AdamW with weight decay 0.1."""
    return run([step(i) for i in range(5)], setup(groups=[group(weight_decay=0.1)]))

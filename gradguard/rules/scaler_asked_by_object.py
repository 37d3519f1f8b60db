"""A loss scaler that is asked about an optimizer under the wrong key.

Looks at: the keys under which the scaler keeps the state of optimizers, right before its update. They are
``id(optimizer)``; the table is a defaultdict, so asking by the optimizer itself never fails, makes a fresh
empty entry, and answers that no overflow was found, always. The stray entry also keeps the scaler from being
pickled or copied before the next update. Limits: a question asked after the update and before the next
backward pass is seen one step later.

Sources: torch/amp/grad_scaler.py (_per_optimizer_states); a published overflow check that could never fire.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG108",
    slug="scaler-asked-by-object",
    family="amp",
    severity=Severity.ERROR,
    summary="The loss scaler is asked for an optimizer's overflow under a key that it does not know.",
    remedy="Use gg.scaler_state(scaler, optimizer).found_inf, or let scaler.step() decide; the scaler's table "
    "is keyed by id(optimizer).",
    needs=(Sight.STEPS, Sight.SCALER),
    explains=("GG106",),
)


def check(run: Evidence) -> Iterator[Finding]:
    """Report steps before whose update the scaler held entries that belong to no optimizer."""
    for name, records in run.by_optimizer.items():
        asked = [r for r in records if r.window is not None and r.window.scaler_strays]
        if asked:
            yield RULE.finding(
                f"at {len(asked)} of {len(records)} steps of {name!r} the loss scaler was asked about an "
                'optimizer by the object itself and not by its id: the answer is always "no overflow"',
                place=name,
                first_step=asked[0].step,
                last_step=asked[-1].step,
                evidence={"steps": len(asked)},
            )


def _asked(strays: int) -> RunLog:
    changes = {"loss_scale_before": 2.0**16, "found_inf": 0.0}
    window = {"scaler_strays": strays}
    return run([step(i, window=window, **changes) for i in range(4)], setup(scaler=True))


def fires_on() -> RunLog:
    """A detector that looks the optimizer itself up."""
    return _asked(1)


def silent_on() -> RunLog:
    """A scaler that nobody asks in the wrong way."""
    return _asked(0)

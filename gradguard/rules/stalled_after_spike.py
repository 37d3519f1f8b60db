"""An adaptive optimizer that hardly moves any more after one enormous gradient.

Looks at: the update-to-weight ratio per learning rate before and after a step whose gradient norm was more than
``spike`` times what is usual. Adam's second moment remembers the square of such a gradient for some
1 / (1 - beta2) steps, and divides every ordinary gradient by it. Limits: a spike in the first steps has nothing
to be compared with; a loss that has reached its optimum in that very step looks alike.

Sources: https://arxiv.org/abs/1412.6980 (Adam), https://arxiv.org/abs/2304.13013 (loss spikes and second
moments).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import drift, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG312",
    slug="stalled-after-spike",
    family="optimizer",
    severity=Severity.WARNING,
    summary="One enormous gradient in the second moments keeps every later update small.",
    remedy="Clip the gradient norm, or skip such steps with a gate; lower beta2 to forget faster.",
    needs=(Sight.STEPS, Sight.SETUP),
)

_ADAPTIVE = frozenset({"Adam", "AdamW", "NAdam", "RAdam", "RMSprop"})


def check(
    run: Evidence, *, spike: float = 100.0, share: float = 0.3, steps: int = 20, settled: int = 5
) -> Iterator[Finding]:
    """Report the first spike of every adaptive optimizer after which updates stay small."""
    adaptive = {g.optimizer for g in (run.setup.groups if run.setup else ()) if g.kind in _ADAPTIVE}
    for name in adaptive & set(run.by_optimizer):
        records = run.by_optimizer[name]
        usual, usual_move, seen = 0.0, 0.0, 0
        for index, record in enumerate(records):
            norm, move = record.gradient_norm, _movement(record)
            if norm is None or not math.isfinite(norm) or move is None:
                continue
            if seen >= settled and norm > spike * usual > 0.0:
                after = _moves_after(records[index + 1 : index + 1 + steps], 10 * usual)
                if len(after) == steps and max(after) < share * usual_move:
                    yield RULE.finding(
                        f"since the gradient of step {record.step} ({norm:.3g}, {norm / usual:.0f} times the "
                        f"usual) {name!r} moves the weights {max(after) / usual_move:.2g} times as far as "
                        "before",
                        place=name,
                        first_step=record.step,
                        last_step=records[-1].step,
                        evidence={
                            "gradient_norm": norm,
                            "usual": usual,
                            "movement": max(after) / usual_move,
                        },
                    )
                    break
                continue
            seen += 1
            # The running mean of what is usual: exact at first, then over some ten steps.
            weight = 1.0 / min(seen, 10)
            usual += weight * (norm - usual)
            usual_move += weight * (move - usual_move)


def _movement(record: StepRecord) -> float | None:
    """Return the update-to-weight ratio per learning rate; None where it is not known."""
    ratio = None if record.drift is None else record.drift.update_to_weight
    rate = max(record.learning_rates, default=0.0)
    return ratio / rate if ratio is not None and math.isfinite(ratio) and rate > 0.0 else None


def _moves_after(records: tuple[StepRecord, ...], limit: float) -> list[float]:
    """Return the movements of steps with an ordinary gradient; stops at the first other one."""
    moves = []
    for record in records:
        move, norm = _movement(record), record.gradient_norm
        if move is None or norm is None or not 0.1 * limit / 10 <= norm <= limit:
            break
        moves.append(move)
    return moves


def _spiked(after: float) -> RunLog:
    records = [step(i) for i in range(10)]
    records.append(step(10, gradient_norm=5e3))
    records += [step(i, drift=drift(update=after)) for i in range(11, 40)]
    return run(records, setup())


def fires_on() -> RunLog:
    """A gradient ten thousand times the usual, and a tenth of the movement ever since."""
    return _spiked(0.01)


def silent_on() -> RunLog:
    """The same spike, clipped by the optimizer: updates are as large as before."""
    return _spiked(0.1)

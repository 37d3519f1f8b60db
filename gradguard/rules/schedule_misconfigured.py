"""A schedule whose own settings drive the learning rate out of any useful range.

Looks at: the learning rates of the first steps and the schedulers behind them. A positive rate below a
thousandth of its maximum within ``early`` steps, or an exponential decay by half or more at every step, is
a schedule in the wrong unit (epochs for steps); a rate that a gamma above 1 has raised tenfold goes the
wrong way; a ReduceLROnPlateau for a metric to maximise that cuts the rate at the first chance while the
loss falls was given the loss. Limits: a rate of exactly 0 is another rule's; a range test of learning rates
raises the rate on purpose.

Sources: https://docs.pytorch.org/docs/stable/optim.html (how to adjust learning rate).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import SchedulerFacts, Setup
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG402",
    slug="schedule-misconfigured",
    family="schedule",
    severity=Severity.WARNING,
    summary="The schedule's settings drive the learning rate out of any useful range.",
    remedy="Choose gamma, step_size and T_max in the unit in which scheduler.step() is "
    "called; use mode='min' for a loss.",
    needs=(Sight.STEPS, Sight.SCHEDULER),
    explains=("GG306",),
)

Records = tuple[StepRecord, ...]


def check(
    run: Evidence, *, early: int = 20, collapse: float = 1e-3, growth: float = 10.0
) -> Iterator[Finding]:
    """Report every optimizer whose schedule collapses, grows, or follows the loss the wrong way."""
    schedulers: dict[str, SchedulerFacts] = {}
    for around in run.of(Setup):
        schedulers |= {one.optimizer: one for one in around.schedulers if one.optimizer is not None}
    for name, one in schedulers.items():
        records = run.by_optimizer.get(name, ())
        yield from _collapsed(one, records, early=early, collapse=collapse)
        yield from _grown(one, records, growth)
        yield from _reversed(one, records)


def _rate(record: StepRecord) -> float:
    return max(record.learning_rates, default=0.0)


def _collapsed(
    one: SchedulerFacts, records: Records, *, early: int, collapse: float
) -> Iterator[Finding]:
    """Look for three small positive rates in a row, or three halvings in a row by an exponential decay."""
    peak = last = 0.0
    small = halved = 0
    halving = one.kind == "ExponentialLR" and one.settings.get("gamma", 1.0) <= 0.5
    for record in records[:early]:
        rate = _rate(record)
        peak = max(peak, rate)
        small = small + 1 if 0.0 < rate <= collapse * peak else 0
        halved = halved + 1 if halving and 0.0 < rate <= 0.5 * last * (1 + 1e-6) else 0
        last = rate
        if small == 3 or halved == 3:
            yield RULE.finding(
                f"{one.kind} has taken the learning rate from {peak:.3g} to {rate:.3g} in {record.step + 1} "
                "optimizer steps",
                place=one.kind,
                first_step=records[0].step,
                last_step=record.step,
                evidence={"learning_rate": rate, "largest": peak, "steps": record.step + 1},
            )
            return


def _grown(one: SchedulerFacts, records: Records, growth: float) -> Iterator[Finding]:
    gamma = one.settings.get("gamma", 1.0)
    if one.kind not in ("ExponentialLR", "StepLR", "MultiStepLR") or not gamma > 1.0 or not records:
        return
    start = _rate(records[0])
    found = next((r for r in records if _rate(r) > growth * start > 0.0), None)
    if found is not None:
        yield RULE.finding(
            f"{one.kind} with gamma {gamma:g} has raised the learning rate from {start:.3g} to "
            f"{_rate(found):.3g} by step {found.step}",
            place=one.kind,
            first_step=records[0].step,
            last_step=found.step,
            evidence={"gamma": gamma, "learning_rate": _rate(found)},
        )


def _reversed(one: SchedulerFacts, records: Records) -> Iterator[Finding]:
    """Look for a cut at the first chance: a metric that is to rise has never risen, while the loss fell."""
    if not one.settings.get("mode_max") or not records:
        return
    start = _rate(records[0])
    cut = next((r for r in records if _rate(r) < start), None)
    calls = cut.window.scheduler_steps if cut is not None and cut.window is not None else ()
    first, now = records[0].loss, None if cut is None else cut.loss
    if cut is None or first is None or now is None or not 0.0 < now < 0.9 * first:
        return
    if calls and calls[0] <= one.settings.get("patience", 10.0) + 2:
        yield RULE.finding(
            f"{one.kind} waits for a metric that rises and cut the learning rate at step {cut.step}, at the "
            f"first chance it had, while the loss fell from {first:.4g} to {now:.4g}",
            place=one.kind,
            first_step=cut.step,
            evidence={"learning_rate": _rate(cut), "loss": now, "first_loss": first},
        )


def _decayed(gamma: float) -> RunLog:
    records = [step(i, learning_rates=(1e-2 * gamma**i,)) for i in range(12)]
    one = SchedulerFacts(kind="ExponentialLR", optimizer="optimizer", settings={"gamma": gamma})
    return run(records, setup(schedulers=(one,)))


def fires_on() -> RunLog:
    """A gamma made for epochs, applied at every step."""
    return _decayed(0.3)


def silent_on() -> RunLog:
    """A gamma made for steps."""
    return _decayed(0.97)

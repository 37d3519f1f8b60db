"""A resumed run whose optimizer begins from nothing.

Looks at: a load into the model, a scheduler that is already well on its way, and an optimizer without state
at the first step after it. Limits: without a scheduler a resumed run looks like fine-tuning, which is
healthy; optimizers without state (plain SGD) are not judged.

Sources: https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html (general checkpoint).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradguard.evidence import Evidence
from gradguard.facts import LoadReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._facts import loaded
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1404",
    slug="checkpoint-state-missing",
    family="checkpoint",
    severity=Severity.WARNING,
    summary="A run was resumed without the state of its optimizer.",
    remedy="Save and load optimizer.state_dict() (and those of the scheduler and the loss "
    "scaler) beside the model's.",
    needs=(Sight.LOADS,),
)


def check(run: Evidence, *, scheduled: int = 2) -> Iterator[Finding]:
    """Report an empty optimizer state while the scheduler says that the run is under way."""
    loads = [one.step for one in run.of(LoadReading) if one.target == "model" and one.matched]
    for name, records in run.by_optimizer.items():
        first = records[0]
        window = first.window
        if window is None or not any(step <= first.step for step in loads):
            continue
        done = _already_scheduled(records)
        later = next((r.window for r in records[1:] if r.window is not None), None)
        stateful = later is not None and bool(later.state_entries)
        if window.state_entries == 0 and stateful and done >= scheduled:
            yield RULE.finding(
                f"weights were loaded and the scheduler of {name!r} stands at {done}, but the "
                "optimizer has no state",
                place=name,
                first_step=first.step,
                evidence={"scheduler_steps": done, "state_entries": 0},
            )


def _already_scheduled(records: Sequence[StepRecord]) -> int:
    """Return how far the scheduler was at least when the first step began.

    It may be found some steps late; in each of those it can have moved on by one.
    """
    for record in records:
        if record.window is not None and record.window.scheduler_steps:
            return max(record.window.scheduler_steps) - (record.step - records[0].step)
    return 0


def _resumed(scheduled: int) -> RunLog:
    windows = [
        {"state_entries": 0 if i == 0 else 4, "scheduler_steps": (scheduled + i,)} for i in range(4)
    ]
    return run([step(i, window=w) for i, w in enumerate(windows)], setup(), loaded())


def fires_on() -> RunLog:
    """The model and the scheduler were restored, the optimizer was not."""
    return _resumed(400)


def silent_on() -> RunLog:
    """Fine-tuning: loaded weights, a new optimizer and a new scheduler."""
    return _resumed(0)

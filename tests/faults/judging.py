"""Runs the zoo and measures how well the diagnosis does on it."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from gradguard.diagnosis import Diagnosis
from gradguard.engine import diagnose
from gradguard.findings import Severity
from gradguard.runlog import RunLog
from tests.faults.cases import Fault, Healthy


@dataclass(frozen=True)
class Verdict:
    """How one fault was judged.

    Attributes:
        detected: some alarm was raised. cause_named: a root cause has the right code.
        place_named: that finding has the right place; None for a fault without a place.
        steps: optimizer steps from the first wrong one to the first alarm; None when undetected.
        diagnosis: of the whole faulty run. twin: of the repaired one.
    """

    fault: Fault
    seed: int
    detected: bool
    cause_named: bool
    place_named: bool | None
    steps: int | None
    diagnosis: Diagnosis
    twin: Diagnosis


@dataclass(frozen=True)
class Calm:
    """How one healthy run was judged."""

    case: Healthy
    seed: int
    diagnosis: Diagnosis


def judge_fault(fault: Fault, seed: int) -> Verdict:
    """Run a fault and its twin, and judge both."""
    log = played(lambda: fault.loop(True), seed)
    diagnosis = diagnose(log)
    right = [c.finding for c in diagnosis.causes if c.finding.code in fault.codes]
    placed = None
    if fault.place is not None:
        placed = any(fault.place in (finding.place or "") for finding in right)
    return Verdict(
        fault=fault,
        seed=seed,
        detected=not diagnosis.healthy,
        cause_named=bool(right),
        place_named=placed,
        steps=steps_to_alarm(log, fault.since),
        diagnosis=diagnosis,
        twin=diagnose(played(lambda: fault.loop(False), seed)),
    )


def judge_healthy(case: Healthy, seed: int) -> Calm:
    """Run a healthy loop and judge it."""
    return Calm(case, seed, diagnose(played(case.loop, seed)))


def played(loop: object, seed: int) -> RunLog:
    """Run a loop with a seed; its own warnings are part of the story, not of ours."""
    assert callable(loop)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log = loop()
    assert isinstance(log, RunLog)
    return log


def steps_to_alarm(log: RunLog, since: int) -> int | None:
    """Return after how many optimizer steps from the first wrong one a judge would first be alarmed.

    The run is judged as it stood after 1, 2, 3... steps; the end of the run is part of it only at the end.
    """
    for count in range(since + 1, len(log) + 1):
        if not diagnose(until(log, count)).healthy:
            return count - since
    return None if diagnose(log).healthy else max(1, len(log) - since)


def until(log: RunLog, count: int) -> RunLog:
    """Return the log as it stood after ``count`` records."""
    last = count == len(log)
    facts = [f for f in log.facts if last or (f.step < count and type(f).__name__ != "RunEnd")]
    findings = [f for f in log.findings if last or f.first_step is None or f.first_step < count]
    return RunLog(list(log)[:count], findings, facts)


@dataclass(frozen=True)
class Score:
    """The zoo in numbers; shares are between 0 and 1."""

    detected: float
    cause_named: float
    place_named: float
    false_alarm_error: float
    false_alarm_warning: float
    median_steps: float | None
    n_faulty: int
    n_healthy: int


def score(verdicts: Sequence[Verdict], calm: Sequence[Calm]) -> Score:
    """Return the figures over all verdicts; the healthy runs and the repaired twins must be silent."""
    silent = [one.diagnosis for one in calm] + [one.twin for one in verdicts]
    placed = [one.place_named for one in verdicts if one.place_named is not None]
    steps = [one.steps for one in verdicts if one.steps is not None]
    return Score(
        detected=share(one.detected for one in verdicts),
        cause_named=share(one.cause_named for one in verdicts),
        place_named=share(placed),
        false_alarm_error=share(alarmed(one, Severity.ERROR) for one in silent),
        false_alarm_warning=share(alarmed(one, Severity.WARNING) for one in silent),
        median_steps=statistics.median(steps) if steps else None,
        n_faulty=len(verdicts),
        n_healthy=len(silent),
    )


def alarmed(diagnosis: Diagnosis, severity: Severity) -> bool:
    """Whether a diagnosis holds an alarm of exactly this severity."""
    return any(cause.finding.severity is severity for cause in diagnosis.causes)


def share(values: Iterable[bool]) -> float:
    """Return the share of true values; 1.0 of none."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 1.0

"""Saved runs, read and judged: what the command line shows, in whichever form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradguard.diagnosis import Diagnosis
from gradguard.engine import Selection, diagnose
from gradguard.replica_logs import together
from gradguard.rundir import Run, RunDirectoryError, read_run
from gradguard.runlog import RunLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One run directory and the judgement on it.

    Attributes:
        name: the directory as it was given.
        diagnosis: the judgement; None when the directory could not be read.
        problems: one sentence for everything that was left out while reading.
        error: one sentence when the judgement is not to be relied on; None when it is.
    """

    name: str
    diagnosis: Diagnosis | None = None
    problems: tuple[str, ...] = ()
    error: str | None = None


def judge(names: Sequence[str], selection: Selection) -> tuple[Judged, ...]:
    """Read run directories and judge each; several replicas of one run are judged together.

    Args:
        names: the run directories; one that cannot be read does not keep the others from being judged.
        selection: which rules are judged, with which thresholds.

    Raises:
        UnknownRuleError: a code, slug or threshold that no rule has.
    """
    runs = [_read(name) for name in names]
    logs = iter(together([run.log for run in runs if isinstance(run, Run)]))
    return tuple(
        _judged(name, run, next(logs), selection)
        if isinstance(run, Run)
        else Judged(name=name, error=run)
        for name, run in zip(names, runs, strict=True)
    )


def _read(name: str) -> Run | str:
    """Return the run, or the sentence that says why there is none."""
    try:
        return read_run(name)
    except RunDirectoryError as error:
        return str(error)


def _judged(name: str, run: Run, log: RunLog, selection: Selection) -> Judged:
    diagnosis = diagnose(
        log,
        select=selection.select,
        ignore=selection.ignore,
        thresholds=selection.thresholds,
    )
    return Judged(
        name=name,
        diagnosis=diagnosis,
        problems=run.problems,
        error=_doubt(name, run, diagnosis),
    )


def _doubt(name: str, run: Run, diagnosis: Diagnosis) -> str | None:
    """Say why silence about this run would mean nothing; None when it means something."""
    if not diagnosis.steps:
        why = f" ({'; '.join(run.problems)})" if run.problems else ""
        return (
            f"{name} holds no optimizer step, so there is nothing to judge{why}; "
            "check a run after its first step"
        )
    if not diagnosis.looked_at:
        lacking = "; ".join(dict.fromkeys(diagnosis.not_looked_at.values()))
        return f"no chosen rule can judge {name}: it lacks {lacking}"
    return None

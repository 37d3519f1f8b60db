"""The logs of several replicas of one run, each made to see what the others hold."""

from __future__ import annotations

from collections.abc import Sequence

from gradguard.facts import ReplicaReading
from gradguard.runlog import RunLog


def together(logs: Sequence[RunLog]) -> list[RunLog]:
    """Return the logs, with the replica readings of all ranks in each log of the same run.

    Logs belong together when they hold readings of the same number of replicas and no rank occurs in
    two of them; a rank that does occur twice means several runs, and those are left as they were.

    Args:
        logs: one per process, in any order; none of them is changed.
    """
    return [_with_facts(log, _of_others(log, logs)) for log in logs]


def _of_others(log: RunLog, logs: Sequence[RunLog]) -> list[ReplicaReading]:
    """Return the replica readings of the other ranks of this log's run."""
    world = _world(log)
    if world is None:
        return []
    family = [one for one in logs if _world(one) == world]
    ranks = [rank for one in family for rank in _ranks(one)]
    if len(ranks) != len(set(ranks)):
        return []
    return [
        reading
        for other in family
        if other is not log
        for reading in other.facts_of(ReplicaReading)
    ]


def _world(log: RunLog) -> int | None:
    """Return of how many replicas the log is one; None for a log of one process, or of several worlds."""
    worlds = {reading.world for reading in log.facts_of(ReplicaReading)}
    return worlds.pop() if len(worlds) == 1 else None


def _ranks(log: RunLog) -> set[int]:
    return {reading.rank for reading in log.facts_of(ReplicaReading)}


def _with_facts(log: RunLog, more: Sequence[ReplicaReading]) -> RunLog:
    return RunLog(log, log.findings, (*log.facts, *more)) if more else log

"""Logs of several replicas: together when they are one run, apart when they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradguard.__main__ import main
from gradguard.facts import ReplicaReading
from gradguard.replica_logs import together
from gradguard.rules import replicas_diverged
from gradguard.rules._runs import run, step
from gradguard.runlog import RunLog
from tests.gradguard.saved_runs import save


@pytest.fixture(autouse=True)
def plain_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """A console of 80 columns without colours, wherever the tests run."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def replica(rank: int, world: int = 2) -> ReplicaReading:
    """Return what one replica holds."""
    return ReplicaReading(step=1, rank=rank, world=world, parameters=float(rank))


def ranks(log: RunLog) -> list[int]:
    """Return the ranks a log knows of."""
    return [one.rank for one in log.facts_of(ReplicaReading)]


def test_replicas_of_one_run_see_each_other():
    """Every rank's log gets the readings of the others, and nothing else changes."""
    logs = [run([step(1)], replica(0)), run([step(1), step(2)], replica(1))]
    merged = together(logs)
    assert [ranks(log) for log in merged] == [[0, 1], [1, 0]]
    assert [len(log) for log in merged] == [1, 2]
    assert [ranks(log) for log in logs] == [[0], [1]]


@pytest.mark.parametrize(
    "readings",
    [[(0, 2), (0, 2)], [(0, 2), (1, 4)], [(0, 2), (1, 2), (1, 2)], [(0, 2)], [None, (0, 2)]],
    ids=["same rank", "other world", "two runs", "alone", "no replica"],
)
def test_logs_of_different_runs_are_kept_apart(readings: list[tuple[int, int] | None]):
    """Logs that are not the ranks of one run stay as they were."""
    logs = [run([step(1)], *([] if one is None else [replica(*one)])) for one in readings]
    assert [ranks(log) for log in together(logs)] == [ranks(log) for log in logs]


def test_replicas_are_judged_together_when_given_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """That replicas have drifted apart is seen when both ranks are given, and cannot be in one."""
    whole = replicas_diverged.fires_on()
    names = []
    for rank in (0, 1):
        own = [f for f in whole.facts if not isinstance(f, ReplicaReading) or f.rank == rank]
        names.append(save(tmp_path / f"rank{rank}", RunLog(whole, facts=own)))
    assert main(["check", names[0]]) == 0
    assert "without runs of several replicas" in " ".join(capsys.readouterr().out.split())
    assert main(["check", *names]) == 1
    assert capsys.readouterr().out.count(f"error {replicas_diverged.RULE.code}") == 2

"""Run directories for the tests of the command line, and what it says when it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradguard.__main__ import main
from gradguard.rundir import RunDirectory
from gradguard.runlog import RunLog


def save(folder: Path, log: RunLog) -> str:
    """Write a log as a run directory and return its path."""
    with RunDirectory.create(folder) as run:
        for entry in (*log, *log.findings, *log.facts):
            run.write(entry)
    return str(folder)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the sentence with which a command is refused, checking that it is one, alone."""
    assert main(argv) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert "Traceback" not in told.err
    return told.err

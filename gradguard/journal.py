"""What a run leaves behind: its log in memory, and the same in a run directory when there is one."""

from __future__ import annotations

from collections.abc import Callable

from gradguard.facts import Fact
from gradguard.findings import RECORDING_FAULT, Finding, Severity
from gradguard.records import StepRecord
from gradguard.rundir import RunDirectory, RunDirectoryError
from gradguard.runlog import LogEntry, RunLog, RunLogError


class Journal:
    """Takes records, facts and findings as they arrive.

    A run directory that cannot be written any more (a full disk) ends the recording and nothing else.

    Attributes:
        log: all of them, in memory.
    """

    def __init__(self) -> None:
        self.log = RunLog()
        self._directory: RunDirectory | None = None

    def record_to(self, directory: RunDirectory) -> None:
        """Write everything from now on to ``directory`` too."""
        self._directory = directory

    def append(self, record: StepRecord) -> None:
        """Add the record of the newest attempt."""
        self.log.append(record)
        self._write(record)

    def add_fact(self, fact: Fact) -> None:
        """Add one fact."""
        self.log.add_fact(fact)
        self._write(fact)

    def add_finding(self, finding: Finding) -> None:
        """Add one finding."""
        self.log.add_finding(finding)
        self._write(finding)

    def close(self) -> None:
        """Close the run directory."""
        directory, self._directory = self._directory, None
        if directory is not None:
            self._recording(directory.close)

    def _write(self, entry: LogEntry) -> None:
        directory = self._directory
        if directory is not None:
            self._recording(lambda: directory.write(entry))

    def _recording(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (RunDirectoryError, RunLogError) as error:
            self._directory = None
            self.add_finding(
                Finding(code=RECORDING_FAULT, severity=Severity.ERROR, message=str(error))
            )

"""A run directory: ``run.json`` says what ran, ``steps.jsonl`` holds what was seen.

``steps.jsonl`` is append-only and every line reaches the operating system before the call returns,
so a killed process loses nothing it has recorded. Reading never unpickles anything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Self

from gradguard.runlog import RunLog, RunLogError, UnreadableLineError, from_line, to_line
from gradguard.runmeta import RunMeta, RunMetaError, describe_run, meta_from_json, meta_to_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradguard.findings import Finding
    from gradguard.records import StepRecord
    from gradguard.runlog import LogEntry

META_NAME = "run.json"
STEPS_NAME = "steps.jsonl"


class RunDirectoryError(RuntimeError):
    """A run directory that cannot be made, written or read; the message is one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A saved run.

    Attributes:
        meta: what ran.
        log: its records and findings.
        problems: one sentence for everything in the directory that could not be read.
    """

    meta: RunMeta
    log: RunLog
    problems: tuple[str, ...] = ()


class RunDirectory:
    """Writes one run; make it with :meth:`create`, close it or use it as a context manager.

    After a failed write it is closed for good: a record left out in the middle would look like a
    step that never happened.
    """

    def __init__(self, path: Path, stream: FileIO) -> None:
        self.path = path
        self._stream = stream
        self._entries = 0
        self._safe_bytes = 0
        self._stopped: str | None = None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        config: Mapping[str, object] = MappingProxyType({}),
        kind: str = "training",
    ) -> RunDirectory:
        """Make the directory (and its parents) and write ``run.json``.

        Args:
            path: a directory that is empty or does not exist.
            config: the run's configuration: names to JSON values, nested as you like.
            kind: what kind of run this is.

        Raises:
            RunDirectoryError: when the directory holds files already or cannot be written, and for
                a configuration that has no JSON form.
        """
        directory = Path(path)
        text = _meta_text(kind, config)
        stream = _claim(directory)
        try:
            _replace_atomically(directory / META_NAME, text)
        except OSError as error:
            stream.close()
            (directory / STEPS_NAME).unlink()
            raise RunDirectoryError(
                f"cannot write {directory / META_NAME}: {_reason(error)}; "
                f"nothing was recorded, choose a place that can be written"
            ) from error
        return cls(directory, stream)

    @property
    def entries(self) -> int:
        """How many records and findings are safely written."""
        return self._entries

    def write_record(self, record: StepRecord) -> None:
        """Append one record; see :meth:`write`."""
        self.write(record)

    def write_finding(self, finding: Finding) -> None:
        """Append one finding; see :meth:`write`."""
        self.write(finding)

    def write(self, entry: LogEntry) -> None:
        """Append one entry and hand it to the operating system.

        Raises:
            RunDirectoryError: when the directory is closed, or when the line cannot be written: a
                part of it is cut off again, what was recorded before stays.
            RunLogError: for an entry that holds something else than plain values; the directory
                stays open and as it was.
        """
        if self._stopped is not None:
            raise RunDirectoryError(f"cannot record to {self.path}: {self._stopped}")
        line = f"{to_line(entry)}\n".encode("ascii")
        try:
            _write_all(self._stream, line)
        except OSError as error:
            self._stop(error)
            raise RunDirectoryError(f"cannot record to {self.path}: {self._stopped}") from error
        self._entries += 1
        self._safe_bytes += len(line)

    def close(self) -> None:
        """Wait until the disk has everything, and close. Closing twice is allowed.

        Raises:
            RunDirectoryError: when the disk does not take what it was given.
        """
        if self._stopped is not None:
            return
        self._stopped = "it was closed; create another run directory for more records"
        try:
            with self._stream:
                os.fsync(self._stream.fileno())
        except OSError as error:
            raise RunDirectoryError(
                f"cannot finish {self.path}: {_reason(error)}; "
                f"the last of its {self._entries} entries may be missing on the disk"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stop(self, error: OSError) -> None:
        """Cut off the part of a line that was written, and close."""
        torn = ""
        with self._stream:
            try:
                self._stream.truncate(self._safe_bytes)
            except OSError:  # a reader still knows a torn last line when it sees one
                torn = " (a torn line follows them)"
        self._stopped = (
            f"{_reason(error)}; recording stopped, {self._entries} entries are safe there{torn}, "
            f"make room and start a new run directory"
        )


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run directory, also one that is still being written or whose process was killed.

    A last line that is cut short is left out and told in ``problems``.

    Raises:
        RunDirectoryError: one sentence, when there is no run directory at ``path``, when it was
            written by something else or by another version, or when a line before the last is torn.
    """
    directory = Path(path)
    try:
        present = directory.is_dir()
    except OSError as error:  # such as a parent that may not be entered
        raise RunDirectoryError(f"cannot read a run from {directory}: {_reason(error)}") from error
    if not present:
        raise RunDirectoryError(
            f"cannot read a run from {directory}: there is no such directory; pass a run directory"
        )
    meta = _read_meta(directory / META_NAME)
    log, problems = _read_steps(directory / STEPS_NAME)
    return Run(meta=meta, log=log, problems=problems)


def _meta_text(kind: str, config: Mapping[str, object]) -> str:
    try:
        return meta_to_json(describe_run(kind, config))
    except RunMetaError as error:
        raise RunDirectoryError(f"cannot start a run: {error}") from None


def _claim(directory: Path) -> FileIO:
    """Make the directory and, exclusively, its empty ``steps.jsonl``: one run, one writer."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        present = sorted(entry.name for entry in directory.iterdir())
        if present:
            raise RunDirectoryError(
                f"cannot start a run in {directory}: it already holds {_some(present)}; "
                f"choose a new directory, or delete this one first"
            )
        return FileIO(directory / STEPS_NAME, "xb")
    except OSError as error:
        raise RunDirectoryError(
            f"cannot start a run in {directory}: {_reason(error)}; "
            f"choose a directory that can be written"
        ) from error


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _replace_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or none."""
    draft = path.with_name(f"{path.name}.part")
    try:
        with draft.open("w", encoding="ascii") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _write_all(stream: FileIO, data: bytes) -> None:
    """Write every byte: on a disk that fills up a write may take only some of them."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def _read_meta(path: Path) -> RunMeta:
    try:
        return meta_from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunDirectoryError(
            f"{path.parent} has no {path.name}; pass a directory that a gradguard run wrote"
        ) from None
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {_reason(error)}") from error
    except UnicodeDecodeError as error:
        raise RunDirectoryError(f"cannot read {path}: it is not text ({error})") from None
    except RunMetaError as error:
        raise RunDirectoryError(f"cannot read {path}: {error}") from None


def _read_steps(path: Path) -> tuple[RunLog, tuple[str, ...]]:
    log, problems = RunLog(), []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    log.add(_entry(line))
                except UnreadableLineError as error:
                    if next(lines, None) is not None:
                        raise RunDirectoryError(f"line {number} of {path}: {error}") from None
                    problems.append(
                        f"line {number} of {path} is torn (its writer was stopped, or still "
                        f"writes); the {number - 1} entries before it were read"
                    )
                except RunLogError as error:
                    raise RunDirectoryError(f"line {number} of {path}: {error}") from None
    except FileNotFoundError:
        problems.append(f"{path} is missing: no record was read")
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {_reason(error)}") from error
    return log, tuple(problems)


def _entry(line: bytes) -> LogEntry:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableLineError(f"not text ({error})") from None
    return from_line(text)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)

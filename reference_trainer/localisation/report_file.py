"""A report as JSON: written so that it can be read back, and read so that a wrong file is told."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from reference_trainer.errors import DataError
from reference_trainer.localisation.report import SCHEMA_VERSION, Report

if TYPE_CHECKING:
    from pathlib import Path

_ADAPTER = TypeAdapter(Report)


def as_json(report: Report) -> str:
    """Return a report as JSON that :func:`from_json` reads back; numbers not finite become null."""
    return _ADAPTER.dump_json(report, indent=1).decode("utf-8") + "\n"


def from_json(text: str) -> Report:
    """Return the report that :func:`as_json` wrote.

    Raises:
        DataError: the text is no report, or one of another version.
    """
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the beginning"
        raise DataError(
            f"this is no report of localisation, version {SCHEMA_VERSION}: {first['msg']} at {place}; "
            "write it anew with `python -m reference_trainer evaluate`"
        ) from None


def write_report(path: Path, report: Report) -> None:
    """Write a report so that ``path`` holds either the old file or the whole new one.

    Raises:
        DataError: the file could not be written.
    """
    draft = path.with_name(f".{path.name}.partial")
    try:
        draft.write_text(as_json(report), encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise DataError(f"could not write {path}: {error.strerror or error}") from error


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        DataError: there is no such file, or it is no report of this version.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"could not read the report {path}: {error}") from None

"""Writes docs/reference/records.md from the docstrings of the records: python docs/generate_reference.py."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from gradguard import records

PAGE = Path(__file__).parent / "reference" / "records.md"
CLASSES = (
    records.StepRecord,
    records.WindowReading,
    records.Drift,
    records.ParameterReading,
    records.PathReading,
    records.ScalerState,
    records.GateDecision,
)
HEAD = """# Records and outcomes

Generated from the docstrings by `python docs/generate_reference.py`; a test compares. All records are frozen
values; "not measured" is `None` and never `0.0`.

## Outcomes

The first row that holds is the outcome of a step.

| outcome | meaning |
| --- | --- |
"""


def page() -> str:
    """Return the text of the page."""
    rows = [f"| `{row.outcome}` | {row.meaning} |" for row in records.OUTCOME_TABLE]
    return HEAD + "\n".join(rows) + "\n" + "".join(section(cls) for cls in CLASSES)


def section(cls: type) -> str:
    """Return the section of one record class: its summary and its attributes."""
    summary, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", attributes, flags=re.MULTILINE)
    table = [f"| `{name}` | {' '.join(text.split())} |" for name, text in entries]
    body = "\n\n| field | meaning |\n| --- | --- |\n" + "\n".join(table) if table else ""
    return f"\n## {cls.__name__}\n\n{' '.join(summary.split())}{body}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

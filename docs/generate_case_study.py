"""Runs the case study and writes its output into the page: python docs/generate_case_study.py (minutes)."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from examples.case_study.__main__ import main

PAGE = Path(__file__).parent / "explanation" / "case-study.md"
_OUTPUT = re.compile(
    r"(?<=^```text\n\$ python -m examples\.case_study\n).*?(?=^```)", re.DOTALL | re.MULTILINE
)


def page() -> str:
    """Return the page with the output that the case study has now."""
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured):
        main([])
    lines = "\n".join(line.rstrip() for line in captured.getvalue().splitlines())
    return _OUTPUT.sub(lambda _: lines + "\n", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

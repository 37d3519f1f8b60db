"""Expected source lines: tests mark a line with a comment and look its number up."""

from __future__ import annotations

import inspect
from pathlib import Path


def marked(mark: str) -> tuple[str, str]:
    """Return ``("tests/.../file.py:48", source)`` of the caller's line that ends with ``# here: mark``."""
    caller = inspect.currentframe().f_back
    file = Path(caller.f_code.co_filename)
    lines = file.read_text().splitlines()
    (number,) = [i for i, text in enumerate(lines, 1) if text.endswith(f"# here: {mark}")]
    return f"{file.name}:{number}", lines[number - 1].strip()


def found(one) -> tuple[str, str]:
    """Return the same two of a result, without the directories."""
    return one.line.rpartition("/")[2], one.source

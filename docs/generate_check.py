"""Runs the commands of docs/how-to/check-a-run.md and writes their output: python docs/generate_check.py."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gradguard.__main__ import main

PAGE = Path(__file__).parent / "how-to" / "check-a-run.md"
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_CONSOLE = re.compile(r"^```console\n(\$ .*?)^```", re.DOTALL | re.MULTILINE)


def page() -> str:
    """Return the page with the output that its commands have now."""
    text = PAGE.read_text(encoding="utf-8")
    with _project(text):
        return _CONSOLE.sub(lambda block: f"```console\n{_session(block[1])}```", text)


@contextlib.contextmanager
def _project(text: str) -> Iterator[None]:
    """Run the page's Python in a new folder and stay there, on a plain console of 80 columns."""
    before, environment = Path.cwd(), dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        names: dict[str, object] = {"__name__": "documentation"}
        for code in _PYTHON.findall(text):
            exec(compile(code, PAGE.name, "exec"), names)
        shutil.move(str(names["runs"]), folder)
        os.chdir(folder)
        os.environ.pop("FORCE_COLOR", None)
        os.environ["COLUMNS"] = "80"
        try:
            yield
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(environment)


def _session(block: str) -> str:
    """Return the commands of a block, each with its output below it."""
    told, status = "", 0
    for line in block.splitlines():
        if line == "$ echo $?":
            told += f"{line}\n{status}\n"
        elif line.startswith("$ gradguard "):
            output, status = _output(shlex.split(line)[2:])
            told += f"{line}\n{output}"
    return told


def _output(arguments: list[str]) -> tuple[str, int]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(arguments)
    return output.getvalue(), status


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""The checks before a training run as rich renderables."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gradguard.checkup import Check, OverfitReport, PreflightReport
from gradguard.views import wording

_STYLES = {"ok": "green", "wrong": "bold red", "not checked": "dim"}
_POINTS = 8


def preflight_view(report: PreflightReport) -> Group:
    """Return every question with its answer, and the whole in one line."""
    table = Table(title="Preflight", title_justify="left")
    table.add_column("question", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("answer", overflow="fold")
    for check in report.checks:
        style = _STYLES[check.verdict]
        table.add_row(check.name, Text(check.verdict, style=style), _answer(check))
    return Group(table, Text(report.conclusion, style=_STYLES["ok" if report.ok else "wrong"]))


def overfit_view(report: OverfitReport) -> Group:
    """Return the verdict, a few points of the loss and, on failure, what the rules say."""
    verdict = "ok" if report.passed else "wrong"
    line = Text(verdict, style=_STYLES[verdict])
    line.append(f": {wording.one_line(report.verdict)}", style="default")
    parts: list[Table | Text] = [line]
    if report.curve:
        parts.append(_curve(report))
    if report.diagnosis is not None:
        parts.append(Text(str(report.diagnosis)))
    return Group(*parts)


def _answer(check: Check) -> Text:
    return Text(wording.one_line(check.message), style="dim" if check.passed is None else "")


def _curve(report: OverfitReport) -> Table:
    table = Table()
    table.add_column("step", justify="right")
    table.add_column("loss", justify="right")
    for step, loss in _few(report.curve):
        table.add_row(str(step), wording.number(loss))
    table.caption = Text(f"to reach: {wording.number(report.target)}")
    return table


def _few(curve: tuple[tuple[int, float], ...]) -> list[tuple[int, float]]:
    """Return at most so many points, evenly, the first and the last among them."""
    if len(curve) <= _POINTS:
        return list(curve)
    last = len(curve) - 1
    return [curve[round(i * last / (_POINTS - 1))] for i in range(_POINTS)]

"""A diagnosis in the terminal: causes first, what follows from them in a line each, what was looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradguard.diagnosis import Cause, Diagnosis
from gradguard.findings import Finding, Rule, Severity
from gradguard.views import wording

STYLES: Mapping[Severity, str] = MappingProxyType(
    {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}
)
"""How findings are coloured."""

_LABEL_WIDTH = len("  evidence")


def diagnosis_view(diagnosis: Diagnosis, *, rules: Mapping[str, Rule] | None = None) -> Group:
    """Return the diagnosis as something rich prints, at any width from 40 columns.

    Args:
        diagnosis: what was found.
        rules: rules by code; where known, their names stand beside the codes, and their families beside
            what was looked at.
    """
    known = rules or {}
    parts: list[RenderableType] = [_headline(diagnosis)]
    for cause in diagnosis.causes:
        parts += [Text(), _title(cause.finding, known), _rows(_told(cause))]
    for note in diagnosis.notes:
        parts += [Text(), _title(note, known), _rows(_place_and_steps(note))]
    parts += [Text(), _rows(_looked_at(diagnosis, known))]
    return Group(*parts)


def _headline(diagnosis: Diagnosis) -> Text:
    steps = _count(diagnosis.steps, "optimizer step")
    if diagnosis.healthy:
        return Text(f"nothing wrong found in {steps}", style="bold green")
    counts = Counter(cause.finding.severity for cause in diagnosis.causes)
    told = [_count(number, one.value) for one, number in counts.items()]
    worst = diagnosis.worst or Severity.WARNING
    return Text(f"{', '.join(told)} in {steps}, root causes first", style=STYLES[worst])


def _title(finding: Finding, known: Mapping[str, Rule]) -> Text:
    """Return severity, code, name and message, such as ``error GG501 graph-cut: no gradient ...``."""
    word = "note" if finding.severity is Severity.INFO else finding.severity.value
    name = f" {known[finding.code].slug}" if finding.code in known else ""
    head = Text(f"{word} {finding.code}{name}", style=STYLES[finding.severity])
    return head.append(f": {wording.one_line(finding.message)}", style="default")


def _told(cause: Cause) -> list[tuple[str, Text]]:
    found = cause.finding
    rows = _place_and_steps(found)
    numbers = ", ".join(f"{name} {wording.number(v)}" for name, v in found.evidence.items())
    for label, text in (("evidence", numbers), ("why", found.cause), ("fix", found.remedy)):
        if text:
            rows.append((label, Text(wording.one_line(text))))
    last_line = _last_line(found.detail)
    if last_line:
        rows.append(("detail", _single(last_line)))
    rows += [("follows", _single(line)) for line in cause.follows]
    return rows


def _place_and_steps(finding: Finding) -> list[tuple[str, Text]]:
    rows = []
    if finding.place:
        rows.append(("place", Text(wording.one_line(finding.place))))
    if finding.first_step is not None:
        rows.append(("steps", Text(_span(finding.first_step, finding.last_step))))
    return rows


def _looked_at(diagnosis: Diagnosis, known: Mapping[str, Rule]) -> list[tuple[str, Text]]:
    """Say how many rules of every family were judged, and what the run lacks for the others."""
    seen, unseen = diagnosis.looked_at, diagnosis.not_looked_at
    chosen = Counter(known[code].family for code in (*seen, *unseen) if code in known)
    judged = Counter(known[code].family for code in seen if code in known)
    order = [name for name in dict.fromkeys(rule.family for rule in known.values()) if chosen[name]]
    families = ", ".join(f"{name} {judged[name]}/{chosen[name]}" for name in order)
    told = f"{len(seen)} of {_count(len(seen) + len(unseen), 'rule')}"
    rows = [("looked at", Text(f"{told}: {families}" if families else told))]
    for index, (what, number) in enumerate(Counter(unseen.values()).most_common()):
        label = "not looked at" if index == 0 else ""
        rows.append((label, Text(f"{_count(number, 'rule')} without {what}")))
    return rows


def _rows(rows: Sequence[tuple[str, Text]]) -> Table:
    """Return labels and texts side by side; long texts are folded beside their label."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=_LABEL_WIDTH, no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(f"  {label}", text)
    return table


def _single(text: str) -> Text:
    """Return text that is cut off at the end of its line instead of being folded."""
    return Text(wording.one_line(text), no_wrap=True, overflow="ellipsis")


def _span(first: int, last: int | None) -> str:
    return f"{first}" if last is None or last == first else f"{first} to {last}"


def _last_line(detail: str | None) -> str | None:
    lines = (detail or "").strip().splitlines()
    return lines[-1] if lines else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

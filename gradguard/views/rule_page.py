"""Rules in the terminal: the list of all, and the page of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradguard.views.diagnosis import STYLES

if TYPE_CHECKING:
    from gradguard.findings import Rule
    from gradguard.pages import Page

_CODE_WIDTH, _SEVERITY_WIDTH = len("GG1501"), len("severity")


def rules_view(rules: Sequence[Rule]) -> Group:
    """Return a table of rules for every family: code, name, severity and summary."""
    slug_width = max((len(rule.slug) for rule in rules), default=0)
    families = dict.fromkeys(rule.family for rule in rules)
    parts: list[RenderableType] = []
    for family in families:
        table = Table.grid(padding=(0, 2, 0, 0))
        for width in (_CODE_WIDTH, slug_width, _SEVERITY_WIDTH):
            table.add_column(min_width=width, no_wrap=True)
        table.add_column()
        for rule in (one for one in rules if one.family == family):
            severity = Text(rule.severity.value, style=STYLES[rule.severity])
            table.add_row(rule.code, rule.slug, severity, Text(rule.summary))
        parts += [Text(family, style="bold"), Padding(table, (0, 0, 1, 0))]
    return Group(*parts)


def page_view(page: Page) -> Group:
    """Return the page of one rule: what is wrong, what to do, what it looks at, an example."""
    rule = page.rule
    parts: list[RenderableType] = [
        Text(f"{rule.code} {rule.slug}", style="bold"),
        Text(f"{rule.severity}, {rule.family}", style=STYLES[rule.severity]),
        Text(),
        Text(rule.summary),
        *_section("What to do", Text(rule.remedy)),
    ]
    for heading, text in page.sections:
        parts += _section(heading, Text(text))
    if rule.needs:
        parts += _section("Needs", Text("\n".join(sight.value for sight in rule.needs)))
    if page.thresholds:
        parts += _section("Thresholds", _thresholds(rule.code, page.thresholds))
    if page.explains:
        parts += _section("Explains", Text(", ".join(page.explains)))
    if page.finding is not None:
        found = page.finding
        example = f"{page.example}\n{found.severity} {found.code}: {found.message}"
        parts += _section("Example", Text(example.strip()))
    return Group(*parts)


def _section(heading: str, content: RenderableType) -> list[RenderableType]:
    """Return an empty line, the heading where there is one, and the content below it."""
    if not heading:
        return [Text(), content]
    return [Text(), Text(heading, style="bold"), Padding(content, (0, 0, 0, 2))]


def _thresholds(code: str, thresholds: Mapping[str, float]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, default in thresholds.items():
        table.add_row(Text(f"{code}.{name}"), Text(f"{default:g}"))
    return table

"""Writes docs/reference/rules/ from the catalogue: python docs/generate_rules.py."""

from __future__ import annotations

from pathlib import Path

from gradguard.findings import Rule
from gradguard.pages import Page, every_rule, find_page

FOLDER = Path(__file__).parent / "reference" / "rules"
HEAD = """# The rules

Generated from the catalogue by `python docs/generate_rules.py`; a test compares.

| code | name | family | severity | what is wrong |
| --- | --- | --- | --- | --- |
"""


def pages() -> dict[str, str]:
    """Return the text of every page by file name."""
    rules = every_rule()
    found = {page_name(rule): page(find_page(rule.code)) for rule in rules}
    return {"index.md": HEAD + "\n".join(row(rule) for rule in rules) + "\n", **found}


def page_name(rule: Rule) -> str:
    """Return the file name of a rule's page."""
    return f"{rule.code.lower()}-{rule.slug}.md"


def row(rule: Rule) -> str:
    """Return one row of the index."""
    link = f"[{rule.code}]({page_name(rule)})"
    return f"| {link} | {rule.slug} | {rule.family} | {rule.severity} | {rule.summary} |"


def page(told: Page) -> str:
    """Return the page of one rule: what, why, what to do, limits, thresholds and an example."""
    rule = told.rule
    thresholds = [f"| `{rule.code}.{n}` | {v:g} |" for n, v in told.thresholds.items()]
    parts = [
        f"# {rule.code} {rule.slug}",
        f"{rule.summary} Severity: {rule.severity}. Family: {rule.family}.",
        f"**What to do.** {rule.remedy}",
        told.story,
    ]
    if rule.needs:
        parts.append("Needs " + "; ".join(sight.value for sight in rule.needs) + ".")
    if thresholds:
        parts.append("| threshold | default |\n| --- | --- |\n" + "\n".join(thresholds))
    if told.explains:
        parts.append("Explains: " + ", ".join(told.explains) + ".")
    if told.finding is not None:
        shown = f"{told.finding.severity} {told.finding.code}: {told.finding.message}"
        parts.append(f"## Example\n\n{told.example}\n\n```text\n{shown}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")

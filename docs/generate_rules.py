"""Writes docs/reference/rules/ from the catalogue: python docs/generate_rules.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradguard.engine import diagnose, thresholds_of
from gradguard.rules import CATALOGUE

FOLDER = Path(__file__).parent / "reference" / "rules"
HEAD = """# The rules

Generated from the catalogue by `python docs/generate_rules.py`; a test compares.

| code | name | family | severity | what is wrong |
| --- | --- | --- | --- | --- |
"""


def pages() -> dict[str, str]:
    """Return the text of every page by file name."""
    found = {page_name(module): page(module) for module in CATALOGUE}
    return {"index.md": HEAD + "\n".join(row(module) for module in CATALOGUE) + "\n", **found}


def page_name(module: Any) -> str:
    """Return the file name of a rule's page."""
    return f"{module.RULE.code.lower()}-{module.RULE.slug}.md"


def row(module: Any) -> str:
    """Return one row of the index."""
    rule = module.RULE
    link = f"[{rule.code}]({page_name(module)})"
    return f"| {link} | {rule.slug} | {rule.family} | {rule.severity} | {rule.summary} |"


def page(module: Any) -> str:
    """Return the page of one rule: what, why, what to do, limits, thresholds and an example."""
    rule = module.RULE
    _, _, story = (module.__doc__ or "").strip().partition("\n\n")
    thresholds = [f"| `{rule.code}.{n}` | {v:g} |" for n, v in thresholds_of(module).items()]
    parts = [
        f"# {rule.code} {rule.slug}",
        f"{rule.summary} Severity: {rule.severity}. Family: {rule.family}.",
        f"**What to do.** {rule.remedy}",
        story,
        "Needs " + "; ".join(sight.value for sight in rule.needs) + ".",
    ]
    if thresholds:
        parts.append("| threshold | default |\n| --- | --- |\n" + "\n".join(thresholds))
    if rule.explains or rule.explains_later:
        parts.append("Explains: " + ", ".join((*rule.explains, *rule.explains_later)) + ".")
    finding = next(f for f in diagnose(module.fires_on()).findings if f.code == rule.code)
    example = (module.fires_on.__doc__ or "").strip()
    parts.append(
        f"## Example\n\n{example}\n\n```text\n{finding.severity} {finding.code}: {finding.message}\n```"
    )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")

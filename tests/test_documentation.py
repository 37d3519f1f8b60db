"""The README and the manual: every Python block runs, every link leads somewhere, generated pages are fresh."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(
            r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_runs(block):
    """A reader who pastes a block gets what the page says, not an error."""
    exec(compile(block, "<documentation>", "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    """Relative links point to files that exist."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_records_page_is_fresh():
    """The generated page equals a fresh generation."""
    spec = importlib.util.spec_from_file_location(
        "generate", ROOT / "docs" / "generate_reference.py"
    )
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page()


def test_the_readme_names_every_outcome():
    """The outcome table of the README has the rows of the table in the code."""
    from gradguard.records import StepOutcome

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{outcome}` |" in text for outcome in StepOutcome)


def test_the_page_of_causes_names_every_rule():
    """Each rule of the catalogue stands beside a cause, and no code that does not exist does."""
    from gradguard.pages import every_rule

    text = (ROOT / "docs" / "explanation" / "causes.md").read_text(encoding="utf-8")
    known = {rule.code for rule in every_rule()}
    named = set(re.findall(r"GG\d{3,4}", text))
    assert named <= known
    assert not {code for code in known - named if not code.startswith("GG00")}

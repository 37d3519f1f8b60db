"""Pages of rules: the list, the page of one, and what they share with the code."""

from __future__ import annotations

import ast
import json
from itertools import pairwise
from pathlib import Path

import pytest

from gradguard import findings
from gradguard.__main__ import main
from gradguard.engine import UnknownRuleError, thresholds_of
from gradguard.pages import OWN_RULES, every_rule, find_page
from gradguard.rules import CATALOGUE, graph_cut
from tests.gradguard.saved_runs import refused


@pytest.fixture(autouse=True)
def plain_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """A console of 80 columns without colours, wherever the tests run."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def test_rules_lists_every_rule(capsys: pytest.CaptureFixture[str]):
    """The list has every code and name, with the findings of the guard itself."""
    assert main(["rules"]) == 0
    told = capsys.readouterr().out
    for rule in every_rule():
        assert f"{rule.code} " in told
        assert f" {rule.slug} " in told
    assert max(len(line) for line in told.splitlines()) <= 80


def test_rules_as_json_have_their_thresholds(capsys: pytest.CaptureFixture[str]):
    """A program finds every rule of the catalogue, with names and defaults of its thresholds."""
    assert main(["rules", "--json"]) == 0
    listed = {one["code"]: one for one in json.loads(capsys.readouterr().out)["rules"]}
    assert set(listed) == {rule.code for rule in every_rule()}
    for module in CATALOGUE:
        assert listed[module.RULE.code]["thresholds"] == thresholds_of(module)


@pytest.mark.parametrize("name", ["GG501", "gg501", "graph-cut"])
def test_explain_shows_the_page_of_a_rule(name: str, capsys: pytest.CaptureFixture[str]):
    """The page has summary, fix, limits, needs, thresholds, what follows and an example."""
    assert main(["explain", name]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith("GG501 graph-cut error, gradient path")
    assert graph_cut.RULE.summary in told
    assert graph_cut.RULE.remedy in told
    for heading in (
        "Looks at",
        "Limits",
        "Sources",
        "Needs",
        f"Explains {', '.join(graph_cut.RULE.explains)}",
        "Example",
    ):
        assert heading in told
    assert "GG501.steps 3" in told


@pytest.mark.parametrize("rule", every_rule(), ids=lambda rule: rule.code)
def test_every_rule_can_be_explained(rule: findings.Rule, capsys: pytest.CaptureFixture[str]):
    """No code that a finding may carry is unknown to ``explain``, and no page breaks."""
    assert main(["explain", rule.code]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith(f"{rule.code} {rule.slug}")
    assert rule.summary in told


@pytest.mark.parametrize("name", ["GG9999", "GG009", "nonsense", ""])
def test_explain_refuses_unknown_rules(name: str, capsys: pytest.CaptureFixture[str]):
    """An unknown code is status 2 and a sentence with codes that are known."""
    assert "known: GG" in refused(capsys, "explain", name)


def test_the_guards_own_findings_say_what_the_code_says():
    """The page of a finding without a rule file has the sentence that stands at its constant."""
    body = ast.parse(Path(findings.__file__).read_text(encoding="utf-8")).body
    sentences = {
        one.value.value: after.value.value
        for one, after in pairwise(body)
        if isinstance(one, ast.Assign)
        and isinstance(one.value, ast.Constant)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert {rule.code: rule.summary for rule in OWN_RULES} == sentences


def test_sections_keep_every_word_of_the_docstring():
    """Splitting a story at its headings loses nothing."""
    for module in CATALOGUE:
        page = find_page(module.RULE.code)
        told = " ".join(
            f"{heading}: {text}" if heading else text for heading, text in page.sections
        )
        assert told == " ".join(page.story.split())
        assert "Looks at" in dict(page.sections)


def test_codes_of_the_guard_are_found_before_the_catalogue():
    """A code near those of the guard names those of the guard."""
    with pytest.raises(UnknownRuleError, match="GG001, GG002, GG003, GG004"):
        find_page("GG005")

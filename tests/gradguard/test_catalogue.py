"""Every rule of the catalogue keeps the promises that all rules make."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from gradguard import rules
from gradguard.engine import RuleModule, diagnose, thresholds_of
from gradguard.evidence import Evidence
from gradguard.findings import FAMILIES, Severity
from gradguard.rules import CATALOGUE
from gradguard.runlog import RunLog

every_rule = pytest.mark.parametrize("module", CATALOGUE, ids=lambda m: m.RULE.code)


def number(module: RuleModule) -> int:
    """Return the number in a rule's code."""
    return int(module.RULE.code.removeprefix("GG"))


def test_codes_are_unique_and_sorted() -> None:
    """The catalogue is in the order of its codes, and no code or slug occurs twice."""
    assert all(number(one) < number(other) for one, other in pairwise(CATALOGUE))
    slugs = [module.RULE.slug for module in CATALOGUE]
    assert len(set(slugs)) == len(slugs)


def test_every_rule_file_is_in_the_catalogue() -> None:
    """A rule file that nobody listed would never be judged."""
    folder = Path(rules.__file__).parent
    files = {path.stem for path in folder.glob("[a-z]*.py")}
    assert files == {module.__name__.rpartition(".")[2] for module in CATALOGUE}


@every_rule
def test_file_slug_and_family_agree(module: RuleModule) -> None:
    """File and slug share a name, and the hundreds of the code are the family."""
    assert module.__name__.rpartition(".")[2] == module.RULE.slug.replace("-", "_")
    assert FAMILIES[number(module) // 100 - 1] == module.RULE.family
    assert re.fullmatch(r"GG\d{3,4}", module.RULE.code)


@every_rule
def test_fires_on_its_example(module: RuleModule) -> None:
    """The example that must fire gives this code, and no other rule calls it an alarm of its own."""
    diagnosis = diagnose(module.fires_on())
    codes = {finding.code for finding in diagnosis.findings}
    roots = {cause.finding.code for cause in diagnosis.causes}
    assert module.RULE.code in codes
    assert roots <= {module.RULE.code}, roots


@every_rule
def test_is_silent_on_its_counterpart(module: RuleModule) -> None:
    """The example that must not fire gives no finding of this rule and no alarm at all."""
    log = module.silent_on()
    assert set(module.RULE.needs) <= Evidence(log).sights, "the example lacks what the rule needs"
    diagnosis = diagnose(log)
    assert module.RULE.code not in {finding.code for finding in diagnosis.findings}
    assert diagnosis.healthy, str(diagnosis)


@every_rule
def test_findings_say_what_to_do(module: RuleModule) -> None:
    """Every finding has a message, a cause, a remedy and at least one number as evidence."""
    for finding in module.check(Evidence(module.fires_on())):
        assert finding.message
        assert finding.cause
        assert finding.remedy
        assert finding.evidence
        assert finding.severity in set(Severity)


@every_rule
def test_is_silent_on_an_empty_run(module: RuleModule) -> None:
    """A rule that is asked about a run without anything in it says nothing and does not raise."""
    assert list(module.check(Evidence(RunLog()))) == []


@every_rule
def test_thresholds_are_numbers(module: RuleModule) -> None:
    """Every threshold has a number as its default, so that the command line can set it."""
    assert all(isinstance(value, (int, float)) for value in thresholds_of(module).values())


@every_rule
def test_documents_itself(module: RuleModule) -> None:
    """Every rule file says what it looks at and what its limits are."""
    text = module.__doc__ or ""
    assert "Looks at:" in text
    assert "Limits:" in text


def test_declared_explanations_exist_and_have_no_cycle() -> None:
    """A rule explains codes that exist, and never, through others, itself."""
    explains = {module.RULE.code: set(module.RULE.explains) for module in CATALOGUE}
    known = set(explains) | {"GG001", "GG002", "GG003"}
    assert all(codes <= known for codes in explains.values())
    for start in explains:
        seen: set[str] = set()
        front = set(explains[start])
        while front:
            seen |= front
            front = {c for code in front for c in explains.get(code, ())} - seen
        assert start not in seen

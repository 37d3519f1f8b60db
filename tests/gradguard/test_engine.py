"""The engine: choosing rules, folding consequences, and staying calm when a rule raises."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gradguard import engine
from gradguard.engine import UnknownRuleError, diagnose, fold
from gradguard.findings import Finding, Rule, Severity
from gradguard.rules import CATALOGUE
from gradguard.rules._runs import readings, run, setup, step


def rule(code: str, *explains: str, later: tuple[str, ...] = ()) -> Rule:
    """Return a rule that explains others."""
    return Rule(
        code=code,
        slug=code.lower(),
        family="amp",
        severity=Severity.ERROR,
        summary="s",
        remedy="r",
        explains=explains,
        explains_later=later,
    )


def found(code: str, first: int | None = 0, severity: Severity = Severity.ERROR) -> Finding:
    """Return a finding that begins at a step."""
    return Finding(code=code, severity=severity, message=code, first_step=first)


RULES = {r.code: r for r in (rule("A", "B"), rule("B", "C"), rule("C"), rule("D", later=("A",)))}


def codes(findings: list[Finding]) -> list[tuple[str, list[str]]]:
    """Return root codes, each with the codes folded under it."""
    causes, _ = fold(findings, RULES)
    return [(c.finding.code, [f.code for f in c.consequences]) for c in causes]


def test_consequences_are_folded_under_their_root():
    """A explains B, B explains C: the diagnosis shows A, with B and C under it."""
    assert codes([found("C", 2), found("B", 1), found("A", 0)]) == [("A", ["B", "C"])]


def test_a_later_cause_explains_nothing_that_was_there_before():
    """What began earlier than the cause stays a cause of its own."""
    assert codes([found("A", 5), found("B", 1)]) == [("B", []), ("A", [])]


def test_explains_later_needs_a_later_step():
    """A problem that can only follow in the next step is not folded within the same one."""
    assert codes([found("D", 1), found("A", 1)]) == [("A", []), ("D", [])]
    assert codes([found("D", 1), found("A", 2)]) == [("D", ["A"])]


def test_a_note_never_explains_an_alarm():
    """A finding of severity INFO folds no error under it and is listed as a note."""
    causes, notes = fold([found("A", 0, Severity.INFO), found("B", 1)], RULES)
    assert [c.finding.code for c in causes] == ["B"]
    assert [n.code for n in notes] == ["A"]


def test_a_rule_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    """A broken rule is named with its traceback, and the others are still judged."""

    def broken(_: object) -> list[Finding]:
        raise KeyError("lost")

    bad = SimpleNamespace(RULE=rule("GG199"), check=broken)
    monkeypatch.setattr(engine, "CATALOGUE", (bad, *CATALOGUE))
    diagnosis = diagnose(run([step(i) for i in range(4)], setup()))
    (cause,) = diagnosis.causes
    assert cause.finding.code == "GG004"
    assert "GG199" in cause.finding.message
    assert "KeyError" in (cause.finding.detail or "")


def test_rules_are_chosen_by_code_prefix_and_slug():
    """Selecting takes a family or a slug; ignoring takes it away again."""
    log = run([step(i, window={"carried_norm": 0.1 if i else 0.0}) for i in range(5)], setup())
    assert [c.finding.code for c in diagnose(log).causes] == ["GG701"]
    assert diagnose(log, select=["GG3"]).healthy
    assert diagnose(log, ignore=["gradients-carried-over"]).healthy
    assert diagnose(log, select=["gg7"]).looked_at == tuple(
        m.RULE.code
        for m in CATALOGUE
        if m.RULE.code.startswith("GG7") and m.RULE.code in diagnose(log).looked_at
    )


def test_thresholds_are_set_by_name():
    """A threshold moves where a rule fires, and an unknown one names the known ones."""
    log = run([step(i, window={"carried_norm": 0.1 if i else 0.0}) for i in range(4)], setup())
    assert diagnose(log, thresholds={"GG701.steps": 5}).healthy
    assert not diagnose(log, thresholds={"GG701.steps": 3}).healthy
    with pytest.raises(UnknownRuleError, match="it has: steps"):
        diagnose(log, thresholds={"GG701.limit": 5})


def test_unknown_names_are_refused():
    """A code that no rule begins with is an error that says so."""
    with pytest.raises(UnknownRuleError, match="GG9999"):
        diagnose(run([]), select=["GG9999"])


def test_an_empty_run_is_said_to_be_unseen():
    """Without a single step nothing is called healthy by having been looked at."""
    diagnosis = diagnose(run([]))
    assert diagnosis.looked_at == ()
    assert "0 optimizer steps" in str(diagnosis)
    assert set(diagnosis.not_looked_at) == {m.RULE.code for m in CATALOGUE}


def test_judging_grows_linearly():
    """Ten thousand steps are judged with one pass per rule: no rule looks back over the run at every step."""
    records = [step(i, parameters=readings() if i % 50 == 0 else None) for i in range(10_000)]
    log = run(records, setup())
    assert diagnose(log).healthy

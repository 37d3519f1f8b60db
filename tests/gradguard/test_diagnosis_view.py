"""A diagnosis in the terminal: the same text at a fixed width, wherever it is drawn."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gradguard.diagnosis import Cause, Diagnosis
from gradguard.findings import Finding, Severity
from gradguard.pages import every_rule
from gradguard.views.diagnosis import diagnosis_view

KNOWN = {rule.code: rule for rule in every_rule()}
CUT = Finding(
    code="GG501",
    severity=Severity.ERROR,
    message="no gradient has reached body.weight, body.bias in 40 steps of 'optimizer'",
    first_step=0,
    last_step=39,
    place="body",
    evidence={"parameters": 2, "share": 0.123456},
    cause="No gradient reaches these parameters.",
    remedy="Look for detach().",
)
STUCK = Finding(
    code="GG306",
    severity=Severity.WARNING,
    message="parameters that never move, with a sentence that is far too long for what is left of a line",
    first_step=3,
)
NOTE = Finding(code="GG307", severity=Severity.INFO, message="worth knowing", first_step=2)


def drawn(diagnosis: Diagnosis, *, width: int = 80, known: bool = True) -> list[str]:
    """Return the lines of a view on a console that is no terminal."""
    console = Console(file=io.StringIO(), width=width, highlight=False, force_terminal=False)
    with console.capture() as captured:
        console.print(diagnosis_view(diagnosis, rules=KNOWN if known else None))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_faulty_run_at_80_columns():
    """The cause comes first with all it stands on, what follows takes one line, notes come last."""
    diagnosis = Diagnosis(
        causes=(Cause(finding=CUT, consequences=(STUCK,)),),
        notes=(NOTE,),
        steps=40,
        looked_at=("GG101", "GG501", "GG502"),
        not_looked_at={"GG102": "a loss scaler", "GG1501": "the printed loss"},
    )
    assert drawn(diagnosis) == [
        "1 error in 40 optimizer steps, root causes first",
        "",
        "error GG501 graph-cut: no gradient has reached body.weight, body.bias in 40",
        "steps of 'optimizer'",
        "  place     body",
        "  steps     0 to 39",
        "  evidence  parameters 2, share 0.1235",
        "  why       No gradient reaches these parameters.",
        "  fix       Look for detach().",
        "  follows   GG306 parameters that never move, with a sentence that is far too l…",
        "",
        f"note GG307 {KNOWN['GG307'].slug}: worth knowing",
        "  steps     2",
        "",
        "  looked at      3 of 5 rules: amp 1/2, gradient path 2/2, reporting 0/1",
        "  not looked at  1 rule without a loss scaler",
        "                 1 rule without the printed loss",
    ]


def test_a_healthy_run_at_80_columns():
    """Silence is said, with what was looked at."""
    diagnosis = Diagnosis(steps=1, looked_at=("GG501",))
    assert drawn(diagnosis) == [
        "nothing wrong found in 1 optimizer step",
        "",
        "  looked at  1 of 1 rule: gradient path 1/1",
    ]


def test_rules_need_not_be_known():
    """Without the catalogue the codes stand alone."""
    diagnosis = Diagnosis(causes=(Cause(finding=CUT),), steps=1, looked_at=("GG501",))
    lines = drawn(diagnosis, known=False)
    assert any(line.startswith("error GG501: no gradient") for line in lines)
    assert lines[-1] == "  looked at  1 of 1 rule"


def test_severities_are_counted():
    """The headline counts root causes by severity, and nothing that is folded."""
    warning = Finding(code="GG001", severity=Severity.WARNING, message="m", first_step=0)
    causes = (
        Cause(finding=CUT, consequences=(STUCK,)),
        Cause(finding=CUT),
        Cause(finding=warning),
    )
    told = drawn(Diagnosis(causes=causes, steps=3))[0]
    assert told == "2 errors, 1 warning in 3 optimizer steps, root causes first"


def test_a_traceback_is_told_by_its_last_line():
    """The detail of a fault is its exception, in one line."""
    fault = Finding(
        code="GG004",
        severity=Severity.WARNING,
        message="a rule raised",
        detail="Traceback:\n  File\nKeyError: 'lost'\n",
    )
    lines = drawn(Diagnosis(causes=(Cause(finding=fault),), steps=1))
    assert "  detail    KeyError: 'lost'" in lines
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_console(width: int):
    """The view fits from 40 columns on."""
    others = tuple(replace(STUCK, code=code) for code in ("GG306", "GG502", "GG604"))
    cause = Cause(finding=CUT, consequences=others)
    lacking = dict.fromkeys(("GG101", "GG102"), "a very long description of what is lacking " * 3)
    lines = drawn(Diagnosis(causes=(cause,), steps=1, not_looked_at=lacking), width=width)
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("  follows") for line in lines) == 3


@given(text=st.text(max_size=40))
def test_text_of_the_user_is_shown_and_not_obeyed(text: str):
    """Markup, control codes and line breaks in names reach no terminal."""
    found = Finding(
        code="GG501",
        severity=Severity.ERROR,
        message=f"[red]{text}[/red]",
        place=text,
        remedy=text,
        detail=text,
    )
    told = "\n".join(drawn(Diagnosis(causes=(Cause(finding=found),), steps=1), width=200))
    assert "[red]" in told
    assert all(letter.isprintable() or letter == "\n" for letter in told)


def test_consequences_of_one_rule_share_a_line():
    """A fault that leaves the same mark on many layers takes one line, which says how many."""
    cause = Cause(finding=CUT, consequences=(STUCK,) * 3)
    follows = [
        line for line in drawn(Diagnosis(causes=(cause,), steps=1), width=400) if "follows" in line
    ]
    assert len(follows) == 1
    assert follows[0].rstrip().endswith("(and 2 more like it)")

"""Judged runs as one strict JSON value, for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradguard.codec import codec_of
from gradguard.findings import Finding, Rule

if TYPE_CHECKING:
    from gradguard.diagnosis import Cause, Diagnosis
    from gradguard.judging import Judged
    from gradguard.pages import Page

FORM_VERSION = 1
"""Goes up when a key changes its meaning or goes away; new keys do not count."""

_FINDING = codec_of(Finding)


def json_form(judged: Sequence[Judged], *, version: str | None = None) -> dict[str, object]:
    """Return the judgements on runs as JSON values; numbers that are not finite are strings.

    Args:
        judged: the runs in order.
        version: of gradguard.
    """
    return {
        "schema": FORM_VERSION,
        "tool": "gradguard",
        "version": version,
        "runs": [_run_form(one) for one in judged],
    }


def rules_form(pages: Sequence[Page], *, version: str | None = None) -> dict[str, object]:
    """Return rules as JSON values: what each says, needs and explains, and its thresholds."""
    return {
        "schema": FORM_VERSION,
        "tool": "gradguard",
        "version": version,
        "rules": [{**_rule_form(page.rule), "thresholds": dict(page.thresholds)} for page in pages],
    }


def _run_form(judged: Judged) -> dict[str, object]:
    told = judged.diagnosis
    return {
        "run": judged.name,
        "error": judged.error,
        "problems": list(judged.problems),
        "diagnosis": None if told is None else diagnosis_form(told),
    }


def diagnosis_form(diagnosis: Diagnosis) -> dict[str, object]:
    """Return one diagnosis as JSON values."""
    return {
        "healthy": diagnosis.healthy,
        "worst": None if diagnosis.worst is None else diagnosis.worst.value,
        "steps": diagnosis.steps,
        "causes": [_cause_form(cause) for cause in diagnosis.causes],
        "notes": [_FINDING.encode(note) for note in diagnosis.notes],
        "looked_at": list(diagnosis.looked_at),
        "not_looked_at": dict(diagnosis.not_looked_at),
    }


def _cause_form(cause: Cause) -> dict[str, object]:
    followers = [_FINDING.encode(one) for one in cause.consequences]
    return {**_FINDING.encode(cause.finding), "consequences": followers}


def _rule_form(rule: Rule) -> dict[str, object]:
    return {
        "code": rule.code,
        "slug": rule.slug,
        "family": rule.family,
        "severity": rule.severity.value,
        "summary": rule.summary,
        "remedy": rule.remedy,
        "needs": [sight.value for sight in rule.needs],
        "explains": list(rule.explains),
        "explains_later": list(rule.explains_later),
    }

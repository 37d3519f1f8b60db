"""Judged runs as SARIF 2.1.0, the form that code hosts and editors show beside the code.

Every run directory is a SARIF run. A root cause is a result of its own severity; what follows from it is
a result of level "note" that names it, so that one fault raises one alarm.

Sources: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import quote

from gradguard.codec import codec_of
from gradguard.findings import Finding, Rule, Severity

if TYPE_CHECKING:
    from gradguard.diagnosis import Diagnosis
    from gradguard.judging import Judged

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
"""Where the schema of the form is published."""

LEVELS: Mapping[Severity, str] = MappingProxyType(
    {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
)
"""Severities in the words of SARIF."""

_SOURCE_LINE = re.compile(r"(?P<file>.+\.py):(?P<line>[1-9]\d*)(?::|,|$)")
_ANY = codec_of(object)


def sarif_form(
    judged: Sequence[Judged], rules: Sequence[Rule], *, version: str | None = None
) -> dict[str, object]:
    """Return the judgements on runs as a SARIF log.

    Args:
        judged: the runs in order.
        rules: every rule that a finding may come from.
        version: of gradguard.
    """
    tool = {"driver": {"name": "gradguard", "rules": [_rule_form(rule) for rule in rules]}}
    if version is not None:
        tool["driver"]["version"] = version
    indices = {rule.code: index for index, rule in enumerate(rules)}
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": tool, **_run_form(one, indices)} for one in judged],
    }


def _rule_form(rule: Rule) -> dict[str, object]:
    return {
        "id": rule.code,
        "name": rule.slug,
        "shortDescription": {"text": rule.summary},
        "help": {"text": rule.remedy},
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
        "properties": {"tags": [rule.family]},
    }


def _run_form(judged: Judged, indices: Mapping[str, int]) -> dict[str, object]:
    """Return one run; several in one file are told apart by the id of their automation details."""
    notices = [_notice(problem, "note") for problem in judged.problems]
    if judged.error is not None:
        notices.append(_notice(judged.error, "error"))
    invocation = {
        "executionSuccessful": judged.error is None,
        "toolExecutionNotifications": notices,
    }
    results = [] if judged.diagnosis is None else list(_results(judged, judged.diagnosis, indices))
    return {
        "automationDetails": {"id": f"gradguard/{judged.name.strip('/')}/"},
        "invocations": [invocation],
        "results": results,
    }


def _notice(sentence: str, level: str) -> dict[str, object]:
    return {"level": level, "message": {"text": sentence}}


def _results(
    judged: Judged, diagnosis: Diagnosis, indices: Mapping[str, int]
) -> Iterator[dict[str, object]]:
    folder = judged.name
    for cause in diagnosis.causes:
        yield _result(cause.finding, folder, indices)
        for one in cause.consequences:
            yield _result(one, folder, indices, follows=cause.finding)
    for note in diagnosis.notes:
        yield _result(note, folder, indices)


def _result(
    finding: Finding, folder: str, indices: Mapping[str, int], *, follows: Finding | None = None
) -> dict[str, object]:
    message = finding.message
    if follows is not None:
        message = f"{message} (follows from {follows.code})"
    elif finding.remedy:
        message = f"{message}. {finding.remedy}"
    form: dict[str, object] = {
        "ruleId": finding.code,
        "level": "note" if follows is not None else LEVELS[finding.severity],
        "message": {"text": message},
        "locations": [_location(finding, folder)],
        "partialFingerprints": {"codeAndPlace/v1": f"{finding.code} {finding.place or ''}".strip()},
        "properties": _properties(finding, follows),
    }
    if finding.code in indices:
        form["ruleIndex"] = indices[finding.code]
    return form


def _location(finding: Finding, folder: str) -> dict[str, object]:
    """Return the source line of a finding that has one, else the log that it was read from."""
    place = finding.place
    line = None if place is None else _SOURCE_LINE.match(place)
    if line is not None:
        region = {"region": {"startLine": int(line["line"])}}
        return {"physicalLocation": {"artifactLocation": {"uri": _uri(line["file"])}, **region}}
    form: dict[str, object] = {
        "physicalLocation": {"artifactLocation": {"uri": _uri(f"{folder}/steps.jsonl")}}
    }
    if place is not None:
        form["logicalLocations"] = [{"fullyQualifiedName": place}]
    return form


def _uri(path: str) -> str:
    """Return a path as a URI: relative ones stay relative."""
    plain = Path(path)
    return plain.as_uri() if plain.is_absolute() else quote(plain.as_posix())


def _properties(finding: Finding, follows: Finding | None) -> dict[str, object]:
    """Return what SARIF has no field for; None is left out."""
    values = {
        "severity": finding.severity.value,
        "evidence": finding.evidence,
        "place": finding.place,
        "firstStep": finding.first_step,
        "lastStep": finding.last_step,
        "cause": finding.cause,
        "remedy": finding.remedy,
        "detail": finding.detail,
        "followsFrom": None if follows is None else follows.code,
    }
    encoded: dict[str, object] = _ANY.encode({k: v for k, v in values.items() if v is not None})
    return encoded

"""SARIF: the parts of the standard that readers rely on."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from gradguard.diagnosis import Cause, Diagnosis
from gradguard.findings import Finding, Severity
from gradguard.judging import Judged
from gradguard.pages import every_rule
from gradguard.views.sarif import sarif_form

CUT = Finding(
    code="GG501",
    severity=Severity.ERROR,
    message="no gradient has reached body.weight",
    first_step=0,
    last_step=39,
    place="body",
    evidence={"parameters": 2, "norm": math.nan},
    cause="The path is cut.",
    remedy="Look for detach().",
)
STUCK = Finding(code="GG306", severity=Severity.ERROR, message="never moves", first_step=3)


def form(*judged: Judged) -> dict[str, Any]:
    """Return the SARIF log of runs, as a reader gets it."""
    text = json.dumps(sarif_form(judged, every_rule(), version="1.2.3"), allow_nan=False)
    read: dict[str, Any] = json.loads(text)
    return read


def run_of(*causes: Cause, notes: tuple[Finding, ...] = (), name: str = "runs/first") -> Judged:
    """Return a judged run."""
    return Judged(name=name, diagnosis=Diagnosis(causes=causes, notes=notes, steps=40))


def location(place: str | None, name: str = "runs/first") -> dict[str, Any]:
    """Return the one location of a finding at a place."""
    found = Finding(code="GG501", severity=Severity.ERROR, message="m", place=place)
    (result,) = form(run_of(Cause(finding=found), name=name))["runs"][0]["results"]
    (told,) = result["locations"]
    return dict(told)


def test_the_log_names_version_tool_and_all_rules():
    """A reader finds the version of the standard, the tool, and a descriptor for every code."""
    log = form(run_of())
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("gradguard", "1.2.3")
    assert [rule["id"] for rule in driver["rules"]] == [rule.code for rule in every_rule()]
    assert {"GG001", "GG002", "GG003", "GG004"} <= {rule["id"] for rule in driver["rules"]}
    for rule in driver["rules"]:
        assert rule["shortDescription"]["text"]
        assert rule["help"]["text"]
        assert rule["defaultConfiguration"]["level"] in {"error", "warning", "note"}


def test_a_healthy_run_has_an_empty_list_of_results():
    """Empty results mean that the run was judged; leaving them out would mean that it was not."""
    (run,) = form(run_of())["runs"]
    assert run["results"] == []
    assert run["invocations"][0]["executionSuccessful"] is True


@pytest.mark.parametrize(
    ("severity", "level"),
    [(Severity.ERROR, "error"), (Severity.WARNING, "warning"), (Severity.INFO, "note")],
)
def test_severities_become_levels(severity: Severity, level: str):
    """Every severity has its word in the standard."""
    found = Finding(code="GG501", severity=severity, message="m")
    (result,) = form(run_of(notes=(found,)))["runs"][0]["results"]
    assert result["level"] == level


def test_a_cause_is_a_result_with_its_evidence():
    """Message, fix, steps and numbers survive; a number that is not finite is a word."""
    log = form(run_of(Cause(finding=CUT)))
    (result,) = log["runs"][0]["results"]
    rules = log["runs"][0]["tool"]["driver"]["rules"]
    assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == "GG501"
    assert result["message"]["text"] == "no gradient has reached body.weight. Look for detach()."
    assert result["properties"]["evidence"] == {"parameters": 2, "norm": "NaN"}
    assert result["properties"]["firstStep"] == 0
    assert result["properties"]["lastStep"] == 39
    assert "detail" not in result["properties"]


def test_what_follows_raises_no_alarm_of_its_own():
    """A consequence is a note that names its cause, whatever its own severity."""
    results = form(run_of(Cause(finding=CUT, consequences=(STUCK,))))["runs"][0]["results"]
    assert [(one["ruleId"], one["level"]) for one in results] == [
        ("GG501", "error"),
        ("GG306", "note"),
    ]
    assert results[1]["properties"]["followsFrom"] == "GG501"
    assert results[1]["properties"]["severity"] == "error"


def test_a_module_is_a_logical_location():
    """A place in the model is named as such, beside the log that it was read from."""
    told = location("encoder.layers.3")
    assert told["logicalLocations"] == [{"fullyQualifiedName": "encoder.layers.3"}]
    assert told["physicalLocation"] == {"artifactLocation": {"uri": "runs/first/steps.jsonl"}}
    assert "logicalLocations" not in location(None)


@pytest.mark.parametrize(
    ("place", "uri", "line"),
    [
        ("model.py:48", "model.py", 48),
        ("src/my model.py:7", "src/my%20model.py", 7),
        ("/repo/model.py:1", "file:///repo/model.py", 1),
    ],
)
def test_a_source_line_is_a_physical_location(place: str, uri: str, line: int):
    """A place that is a line of Python is shown at that line."""
    assert location(place) == {
        "physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": line}}
    }


@pytest.mark.parametrize("place", ["model.py", "model.py:0", "group 0", "model.py:x", "py:3"])
def test_other_places_are_no_source_lines(place: str):
    """What only resembles a source line is not sent to an editor."""
    assert location(place)["logicalLocations"] == [{"fullyQualifiedName": place}]


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("./runs/a b/", "runs/a%20b/steps.jsonl"),
        ("/data/run", "file:///data/run/steps.jsonl"),
        ("../run", "../run/steps.jsonl"),
    ],
)
def test_the_log_is_named_as_it_was_given(name: str, uri: str):
    """A relative run directory stays relative: a report holds no path of a machine by itself."""
    assert location(None, name)["physicalLocation"]["artifactLocation"]["uri"] == uri


def test_a_run_that_was_not_judged_failed():
    """A run that cannot be read is an unsuccessful invocation with its sentence, and no results."""
    log = form(run_of(), Judged(name="gone", error="cannot read", problems=("torn",)))
    first, second = log["runs"]
    assert first["invocations"][0]["executionSuccessful"] is True
    (invocation,) = second["invocations"]
    assert invocation["executionSuccessful"] is False
    notices = [
        (one["level"], one["message"]["text"]) for one in invocation["toolExecutionNotifications"]
    ]
    assert notices == [("note", "torn"), ("error", "cannot read")]
    assert second["results"] == []


def test_runs_are_told_apart():
    """Several runs in one file have different categories, as code hosts demand."""
    log = form(run_of(name="runs/a"), run_of(name="runs/b"))
    ids = [run["automationDetails"]["id"] for run in log["runs"]]
    assert ids == ["gradguard/runs/a/", "gradguard/runs/b/"]

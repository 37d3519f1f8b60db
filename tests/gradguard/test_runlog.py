import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradguard.codec import codec_of
from gradguard.findings import Finding, Severity
from gradguard.records import SCHEMA_VERSION, StepOutcome, StepRecord
from gradguard.runlog import RunLog, RunLogError, UnreadableLineError, from_line, to_line
from tests.gradguard.record_strategies import bits, findings, outcomes, records

SKIPPED = StepOutcome.SKIPPED_BY_SCALER


def step(number=0, outcome=StepOutcome.APPLIED, optimizer="main", **readings):
    """Build a record of one attempt."""
    return StepRecord(step=number, optimizer=optimizer, outcome=outcome, **readings)


def edited(**changes):
    """One good line with fields replaced, or removed where the new value is ``...``."""
    fields = json.loads(to_line(step(3))) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not ...})


small_logs = st.lists(st.tuples(outcomes, st.sampled_from("ab")), max_size=30).map(
    lambda rows: RunLog(step(number, *row) for number, row in enumerate(rows))
)


@given(st.lists(records, max_size=3), st.lists(findings, max_size=2))
def test_a_log_comes_back_bit_for_bit(some_records, some_findings):
    """JSON Lines bring back every field: -0.0, subnormals, NaN, infinity, None, any text."""
    log = RunLog(some_records, some_findings)
    back = RunLog.from_jsonl(log.to_jsonl())
    assert bits(tuple(back)) == bits(tuple(log))
    assert back.findings == log.findings


@given(records | findings)
def test_a_line_is_strict_json_on_one_line(entry):
    """A line is ASCII without a line break, and JSON for readers that know no NaN."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = to_line(entry)
    fields = json.loads(line, parse_constant=refuse)
    assert line.isascii()
    assert line.isprintable()
    assert fields["schema"] == SCHEMA_VERSION
    assert fields["kind"] == ("step" if isinstance(entry, StepRecord) else "finding")


def test_not_measured_is_null_and_zero_is_zero():
    """None is written as null, 0.0 as 0.0, and numbers JSON has no word for as strings."""
    fields = json.loads(to_line(step(loss=None, found_inf=0.0, wall_s=math.nan, guard_s=-math.inf)))
    assert fields["loss"] is None
    assert fields["found_inf"] == 0.0
    assert (fields["wall_s"], fields["guard_s"]) == ("NaN", "-Infinity")


def test_a_reading_added_later_is_not_measured_in_an_older_file():
    """A file without a field that has a default reads as if it had not been measured."""
    assert from_line(edited(averaged_lag=...)) == step(3)


def test_whole_numbers_of_other_json_tools_are_numbers():
    """A tool that rewrites 2.0 as 2 does not make a log unreadable."""
    loss = from_line(edited(loss=2)).loss
    assert (type(loss), loss) == (float, 2.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (edited(schema=2), "schema 2, this gradguard reads 1; use a gradguard of the version"),
        (edited(schema=...), "schema None"),
        (edited(schema=True), "schema True"),
        (edited(kind="epoch"), "kind 'epoch'; known are step, finding"),
        (edited(kind=["step"]), r"kind \['step'\]"),
        (edited(lossy=1.0), "StepRecord has no field 'lossy'; known are step, optimizer"),
        (edited(optimizer=...), "StepRecord needs the field 'optimizer'"),
        (edited(loss="0.5"), "loss: expected a number, got '0.5'"),
        (edited(loss=True), "loss: expected a number, got True"),
        (edited(loss="x" * 99), "loss: expected a number, got 'x{56}\\.\\.\\."),
        (edited(loss=10**400), "loss: the number is too large for 64 bits"),
        (edited(loss=0).replace('"loss": 0', '"loss": 1e999'), "loss: the number is too large"),
        (edited(step=1.5), "step: expected an integer, got 1.5"),
        (edited(step=None), "step: expected an integer, got None"),
        (edited(optimizer=1), "optimizer: expected a string, got 1"),
        (edited(outcome="DONE"), "outcome: expected one of APPLIED, SKIPPED_BY_SCALER.*'DONE'"),
        (edited(terms=[1.0]), "terms: expected a mapping, got a list"),
        (edited(terms={"a": "b"}), "terms.a: expected a number, got 'b'"),
        (edited(learning_rates=0.1), "learning_rates: expected a list, got 0.1"),
        (edited(groups=[{}]), r"groups\[0\]: a Drift needs the field 'name'"),
        (edited(drift=3), "drift: expected the fields of a Drift, got 3"),
    ],
)
def test_a_foreign_line_is_refused_with_its_place(line, message):
    """The error names the line, the field, what came and what was expected."""
    with pytest.raises(RunLogError, match=f"^line 2: .*{message}"):
        RunLog.from_jsonl(f"{to_line(step())}\n{line}\n")


@pytest.mark.parametrize(
    "line", ["", "{", edited()[:-1], "[1]", "null", edited(loss=math.nan), "[" * 100_000]
)
def test_what_is_not_json_is_told_apart(line):
    """Text that is no strict JSON object, such as half a line or a bare NaN, is unreadable."""
    with pytest.raises(UnreadableLineError, match=r"^line 1: not a "):
        RunLog.from_jsonl(f"{line}\n")


@pytest.mark.parametrize(
    ("readings", "message"),
    [
        ({"loss": torch.ones(())}, "loss: expected a number, got a Tensor"),
        ({"loss": 10**400}, "loss: the number is too large for 64 bits"),
        ({"step": 1.0}, "step: expected an integer, got 1.0"),
        ({"drift": {"name": "all"}}, "drift: expected a Drift, got a dict"),
        ({"terms": {1: 0.5}}, "terms: expected names that are strings, got 1"),
        ({"learning_rates": [0.1]}, "learning_rates: expected a tuple, got a list"),
    ],
)
def test_a_record_of_something_else_than_plain_values_is_not_written(readings, message):
    """A tensor or a wrong type in a record is named with its field before anything is written."""
    fields = {"step": 7, "optimizer": "main", "outcome": SKIPPED} | readings
    with pytest.raises(RunLogError, match=f"^cannot write step .* of optimizer 'main': {message}"):
        to_line(StepRecord(**fields))


def test_a_faulty_finding_is_named_by_its_code():
    """The error for a finding that cannot be written names its code."""
    finding = Finding(code="GG001", severity=Severity.INFO, message=None)
    with pytest.raises(RunLogError, match="finding GG001: message: expected a string, got None"):
        to_line(finding)


def test_an_unknown_annotation_is_an_error_of_ours():
    """A new record field of a kind without a JSON form is noticed when the module is imported."""
    with pytest.raises(TypeError, match=r"no JSON form for a value annotated .*complex"):
        codec_of(complex)


def test_the_empty_log_is_the_empty_text():
    """An empty log writes nothing, and nothing reads as an empty log."""
    assert RunLog().to_jsonl() == ""
    assert len(RunLog.from_jsonl("")) == 0
    assert RunLog().last is None


@given(small_logs)
def test_outcomes_are_counted_once(log):
    """The counts of all outcomes add up to the number of records, in parts as in the whole."""
    assert sum(log.count(outcome) for outcome in StepOutcome) == len(log)
    parts = [log.for_optimizer(name) for name in log.optimizers]
    assert sum(part.count(SKIPPED) for part in parts) == log.count(SKIPPED)


@given(small_logs)
def test_streaks_are_taken_per_optimizer(log):
    """Streaks are the runs that grouping each optimizer's own records finds, oldest first."""
    expected = [
        tuple(run)
        for name in "ab"
        for outcome, run in itertools.groupby(
            (record for record in log if record.optimizer == name), key=lambda r: r.outcome
        )
        if outcome is SKIPPED
    ]
    assert log.streaks(SKIPPED) == sorted(expected, key=lambda streak: streak[0].step)


def test_a_good_step_of_another_optimizer_does_not_end_a_streak():
    """Three skipped steps of one optimizer are one streak although the other one steps between."""
    log = RunLog()
    for number in range(3):
        log.append(step(number, SKIPPED, "generator"))
        log.append(step(number, StepOutcome.APPLIED, "critic"))
    assert [len(streak) for streak in log.streaks(SKIPPED)] == [3]


@given(small_logs, st.integers(min_value=0, max_value=40))
def test_a_window_is_the_newest_part(log, last_n):
    """A window holds the newest records in order, and all of them when there are fewer."""
    whole = list(log)
    assert list(log.window(last_n)) == whole[len(whole) - min(last_n, len(whole)) :]


def test_parts_are_logs_without_findings():
    """Slices, windows and optimizers give logs of records; findings stay with the whole run."""
    finding = Finding(code="GG001", severity=Severity.INFO, message="something")
    log = RunLog([step(0), step(1)])
    log.add_finding(finding)
    assert log.findings == (finding,)
    assert [part.findings for part in (log[1:], log.window(1), log.for_optimizer("main"))] == [
        ()
    ] * 3
    assert (log[-1], log.last, list(log[:1])) == (step(1), step(1), [step(0)])
    assert repr(log) == "RunLog(2 records, 1 findings)"


def test_a_negative_window_is_refused():
    """A negative number of records is an error and not an empty answer."""
    with pytest.raises(ValueError, match="last_n=-1; pass 0 or more"):
        RunLog().window(-1)

"""The command line: what it says, and the exit status a script can rely on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from gradguard.__main__ import main
from gradguard.findings import Finding, Severity
from gradguard.rules import graph_cut, skipped_step_streak
from gradguard.rules._runs import run, setup, step
from gradguard.rundir import META_NAME, STEPS_NAME, RunDirectory, RunDirectoryError, read_run
from gradguard.runlog import RunLog
from tests.gradguard.saved_runs import refused, save


@pytest.fixture(autouse=True)
def plain_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """A console of 80 columns without colours, wherever the tests run."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def faulty(tmp_path: Path) -> str:
    """A run with one error: a cut graph."""
    return save(tmp_path / "faulty", graph_cut.fires_on())


@pytest.fixture
def healthy(tmp_path: Path) -> str:
    """A run with nothing wrong."""
    return save(tmp_path / "healthy", run([step(i) for i in range(6)], setup()))


@pytest.fixture
def warned(tmp_path: Path) -> str:
    """A run with one warning: a part of the guard raised."""
    log = run([step(i) for i in range(6)], setup())
    log.add_finding(Finding(code="GG001", severity=Severity.WARNING, message="a part raised"))
    return save(tmp_path / "warned", log)


def test_a_healthy_run_leaves_with_0(healthy: str, capsys: pytest.CaptureFixture[str]):
    """Nothing found is status 0, said in words, with what was and was not looked at."""
    assert main(["check", healthy]) == 0
    told = capsys.readouterr()
    assert "nothing wrong found in 6 optimizer steps" in told.out
    assert "looked at" in told.out
    assert "without a loss scaler" in " ".join(told.out.split())
    assert told.err == ""


def test_a_faulty_run_leaves_with_1(faulty: str, capsys: pytest.CaptureFixture[str]):
    """A finding is status 1 and is told with its code, name, place and fix."""
    assert main(["check", faulty]) == 1
    told = capsys.readouterr().out
    assert "error GG501 graph-cut: no gradient has reached first.weight" in told
    assert "place     first" in told
    assert "fix " in told


@pytest.mark.parametrize(
    ("fail_on", "status"), [("error", 0), ("warning", 1), ("never", 0)], ids=str
)
def test_fail_on_sets_the_least_severity_that_fails(warned: str, fail_on: str, status: int):
    """A warning fails a run unless only errors, or nothing, shall."""
    assert main(["check", warned, "--fail-on", fail_on]) == status


def test_an_error_fails_by_default_and_with_error_but_never_with_never(faulty: str):
    """An error is at or above every severity that can be asked for."""
    statuses = [main(["check", faulty, "--fail-on", one]) for one in ("error", "warning", "never")]
    assert statuses == [1, 1, 0]


def test_a_missing_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A path without a directory is status 2 and a sentence."""
    assert "there is no such directory" in refused(capsys, "check", str(tmp_path / "nowhere"))


def test_an_empty_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A directory without a run is status 2 and a sentence."""
    assert "has no run.json" in refused(capsys, "check", str(tmp_path))


@pytest.mark.parametrize(
    "text", ["{}", "[1]", "not json", '{"format": "other-run"}', "\x00\xff"], ids=ascii
)
def test_a_foreign_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
):
    """A run.json that another program wrote is status 2 and a sentence."""
    (tmp_path / META_NAME).write_text(text, encoding="latin-1")
    assert "cannot read" in refused(capsys, "check", str(tmp_path))


def test_a_file_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A file where a directory was expected is status 2 and a sentence."""
    (tmp_path / "file").write_text("x")
    assert "no such directory" in refused(capsys, "check", str(tmp_path / "file"))


def test_a_directory_that_may_not_be_entered_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A missing permission is a sentence, not a traceback."""

    def denied(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", denied)
    assert "Permission denied" in refused(capsys, "check", str(tmp_path))


def test_a_torn_last_line_is_tolerated_and_said(faulty: str, capsys: pytest.CaptureFixture[str]):
    """A run whose writer was killed is judged, and the torn line is named."""
    with Path(faulty, STEPS_NAME).open("a") as stream:
        stream.write('{"kind":"step","sche')
    assert main(["check", faulty]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "is torn" in told
    assert "GG501" in told


def test_a_healthy_run_with_a_torn_last_line_is_not_called_healthy(
    healthy: str, capsys: pytest.CaptureFixture[str]
):
    """What there is was judged, and what is lost is said in one sentence: status 2."""
    with Path(healthy, STEPS_NAME).open("a") as stream:
        stream.write('{"kind":"step","sche')
    assert main(["check", healthy]) == 2
    captured = capsys.readouterr()
    assert "nothing wrong found" in captured.out
    assert captured.err.startswith("error: line ")
    assert "is torn" in captured.err
    assert captured.err.count("\n") == 1


def test_a_line_torn_in_the_middle_is_refused(faulty: str, capsys: pytest.CaptureFixture[str]):
    """A hole in the log makes every judgement worthless: status 2."""
    path = Path(faulty, STEPS_NAME)
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:20]
    path.write_text("\n".join(lines) + "\n")
    assert "line 2 of" in refused(capsys, "check", faulty)


@pytest.mark.parametrize("text", ["", '{"kind":"st'], ids=["empty", "torn"])
def test_a_run_without_a_step_is_refused(
    healthy: str, capsys: pytest.CaptureFixture[str], text: str
):
    """A run that holds no step is not healthy, it is unknown: status 2."""
    Path(healthy, STEPS_NAME).write_text(text)
    assert "holds no optimizer step" in refused(capsys, "check", healthy)


def test_a_run_without_its_log_is_refused(healthy: str, capsys: pytest.CaptureFixture[str]):
    """A directory that lost steps.jsonl is status 2, and the missing file is named."""
    Path(healthy, STEPS_NAME).unlink()
    assert "is missing" in refused(capsys, "check", healthy)


def test_what_is_known_of_a_run_without_a_step_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A fault of the guard before the first step is shown although the status stays 2."""
    fault = Finding(code="GG001", severity=Severity.WARNING, message="a part raised")
    assert main(["check", save(tmp_path / "early", RunLog(findings=[fault]))]) == 2
    told = capsys.readouterr()
    assert "a part raised" in told.out
    assert "nothing wrong" not in told.out
    assert "holds no optimizer step" in told.err


def test_a_judgement_without_a_rule_that_could_look_is_none(
    healthy: str, capsys: pytest.CaptureFixture[str]
):
    """When no chosen rule can be judged, the silence of the rules is not called health."""
    assert "it lacks a loss scaler" in refused(capsys, "check", healthy, "--select", "GG101")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--select", "GG9999"], "no rule has the code, slug or family 'GG9999'"),
        (["--ignore", "no-such-rule"], "'no-such-rule'"),
        (["--select", ""], "--select got ''"),
        (["--ignore", " , "], "--ignore got ' , '"),
        (["--select", "amp", "--ignore", "GG1"], "leave no rule"),
        (["--select", "GG501", "--ignore", "graph-cut"], "leave no rule"),
        (["--threshold", "GG501.steps"], "CODE.name=value"),
        (["--threshold", "GG501=3"], "CODE.name=value"),
        (["--threshold", "GG501.steps="], "'' is not a number"),
        (["--threshold", "GG501.steps=many"], "'many' is not a number"),
        (["--threshold", "GG501.steps=nan"], "finite"),
        (["--threshold", "GG501.steps=-inf"], "finite"),
        (["--threshold", "GG501.steps=1e999"], "finite"),
        (["--threshold", "GG501.steps=2.5"], "whole number, 3 by default"),
        (["--threshold", "GG501.stride=2"], "no threshold 'stride'; it has: steps"),
        (["--threshold", "GG9999.steps=2"], "'GG9999'"),
        (["--fail-on", "info"], "invalid choice"),
        (["--json", "--sarif"], "both go to standard output"),
        (["--selec", "GG501"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_are_refused(
    healthy: str, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
):
    """An unknown rule, name, number or option is status 2 and one sentence on standard error."""
    assert sentence in refused(capsys, "check", healthy, *options)


@pytest.mark.parametrize("argv", [[], ["check"], ["explain"], ["no-such-command"]], ids=str)
def test_incomplete_commands_are_refused(capsys: pytest.CaptureFixture[str], argv: list[str]):
    """A command line that is no command is status 2 and one sentence."""
    assert "--help" in refused(capsys, *argv)


def test_empty_names_between_commas_are_dropped(faulty: str):
    """A comma too many does not select everything."""
    assert main(["check", faulty, "--select", "GG501,"]) == 1
    assert main(["check", faulty, "--ignore", "GG501,,"]) == 0


def test_rules_are_selected_and_ignored_by_code_and_name(faulty: str):
    """The finding goes away when its rule is not judged."""
    assert main(["check", faulty, "--select", "GG7", "--select", "GG3"]) == 0
    assert main(["check", faulty, "--select", "GG7,graph-cut"]) == 1
    assert main(["check", faulty, "--ignore", "graph-cut"]) == 0


@pytest.mark.parametrize("key", ["GG501", "gg501", "graph-cut"])
def test_a_threshold_moves_where_a_rule_fires(faulty: str, key: str):
    """The run has five steps: a rule that wants six is silent, one that wants five is not."""
    assert main(["check", faulty, "--threshold", f"{key}.steps=6"]) == 0
    assert main(["check", faulty, "--threshold", f"{key}.steps=5.0"]) == 1


def test_several_runs_are_judged_and_the_worst_status_wins(
    faulty: str, healthy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Every readable run is told, whatever happens to the others; 2 beats 1 beats 0."""
    assert main(["check", healthy, faulty]) == 1
    assert main(["check", healthy, healthy]) == 0
    capsys.readouterr()
    assert main(["check", str(tmp_path / "nowhere"), faulty, healthy]) == 2
    told = capsys.readouterr()
    assert "GG501" in told.out
    assert "nothing wrong found" in told.out
    assert told.err.count("\n") == 1


def test_json_goes_to_standard_output_alone(faulty: str, capsys: pytest.CaptureFixture[str]):
    """Without a file the JSON is all there is on standard output, and it is strict."""
    assert main(["check", faulty, "--json"]) == 1

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    form = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert set(form) == {"schema", "tool", "version", "runs"}
    (told,) = form["runs"]
    assert told["run"] == faulty
    assert told["error"] is None
    diagnosis = told["diagnosis"]
    assert diagnosis["healthy"] is False
    assert diagnosis["worst"] == "error"
    (cause,) = diagnosis["causes"]
    assert (cause["code"], cause["place"], cause["first_step"]) == ("GG501", "first", 0)
    assert cause["evidence"] == {"parameters": 2, "steps": 5}
    assert cause["consequences"] == []
    assert "GG501" in diagnosis["looked_at"]
    assert "a loss scaler" in diagnosis["not_looked_at"]["GG101"]


def test_json_folds_consequences_under_their_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """What follows stands below its cause and nowhere else."""
    name = save(tmp_path / "skipping", skipped_step_streak.fires_on())
    assert main(["check", name, "--json"]) == 1
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    (cause,) = told["diagnosis"]["causes"]
    assert cause["code"] == "GG101"
    assert "GG103" in [one["code"] for one in cause["consequences"]]


def test_json_writes_numbers_that_are_not_finite_as_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A NaN in the evidence does not break a strict reader."""
    log = run([step(i) for i in range(6)], setup())
    evidence = {"loss": math.nan, "norm": -math.inf}
    log.add_finding(Finding(code="GG001", severity=Severity.INFO, message="m", evidence=evidence))
    assert main(["check", save(tmp_path / "run", log), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    (note,) = told["diagnosis"]["notes"]
    assert note["evidence"] == {"loss": "NaN", "norm": "-Infinity"}


def test_json_and_sarif_go_to_files_beside_the_text(
    faulty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With files named, the text stays on standard output and both files are written."""
    files = [str(tmp_path / "out.json"), str(tmp_path / "out.sarif")]
    assert main(["check", faulty, "--json", files[0], "--sarif", files[1]]) == 1
    assert "GG501" in capsys.readouterr().out
    forms = [json.loads(Path(name).read_text()) for name in files]
    assert forms[0]["schema"] == 1
    assert forms[1]["version"] == "2.1.0"


def test_json_tells_of_runs_that_could_not_be_read(
    healthy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A program sees which of its runs has no judgement, and why."""
    assert main(["check", healthy, str(tmp_path / "nowhere"), "--json"]) == 2
    read, unread = json.loads(capsys.readouterr().out)["runs"]
    assert read["diagnosis"]["healthy"] is True
    assert unread["diagnosis"] is None
    assert "no such directory" in unread["error"]


def test_a_file_that_cannot_be_written_is_refused(
    healthy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A judgement that could not be handed over is status 2, not 0."""
    for target in (tmp_path, tmp_path / "no" / "such" / "folder.json"):
        assert "cannot write" in refused(capsys, "check", healthy, "--json", str(target))


def test_reading_says_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory that the system refuses to look at is a RunDirectoryError with its reason."""

    def denied(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(RunDirectoryError, match="Permission denied"):
        read_run(tmp_path)


def test_help_and_version_leave_with_0(capsys: pytest.CaptureFixture[str]):
    """Asking for help is no error."""
    assert main(["--help"]) == 0
    assert main(["check", "--help"]) == 0
    assert main(["--version"]) == 0
    assert "gradguard" in capsys.readouterr().out


def test_a_name_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Control characters and markup in a message are shown, not obeyed."""
    log = run([step(i) for i in range(4)], setup())
    message = "layer [bold]x[/bold] \x1b[31m\nred"
    log.add_finding(Finding(code="GG001", severity=Severity.WARNING, message=message))
    assert main(["check", save(tmp_path / "run", log)]) == 1
    told = capsys.readouterr().out
    assert "[bold]x[/bold]" in told
    assert "\x1b" not in told


def test_it_runs_as_a_module(faulty: str):
    """``python -m gradguard`` leaves with the status, also where the output knows ASCII only."""
    done = subprocess.run(
        [sys.executable, "-m", "gradguard", "check", faulty],
        capture_output=True,
        text=True,
        env={"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", "COLUMNS": "40"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "GG501" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 40


def test_a_run_that_is_still_being_written_is_judged(tmp_path: Path):
    """Nothing has to be closed before a run is judged."""
    with RunDirectory.create(tmp_path / "open") as writer:
        for entry in graph_cut.fires_on():
            writer.write_record(entry)
        assert main(["check", str(tmp_path / "open")]) == 1

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradguard.findings import RECORDING_FAULT, Finding, Severity
from gradguard.records import StepOutcome, StepRecord
from gradguard.rundir import META_NAME, STEPS_NAME, RunDirectory, RunDirectoryError, read_run
from gradguard.runlog import RunLogError, to_line
from tests.gradguard.record_strategies import bits, findings, records

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
needs_full_device = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full"
)

ENDLESS_WRITER = """
import itertools, sys
from gradguard.records import StepOutcome, StepRecord
from gradguard.rundir import RunDirectory

run = RunDirectory.create(sys.argv[1])
for number in itertools.count():
    run.write_record(StepRecord(step=number, optimizer="main", outcome=StepOutcome.APPLIED))
    print(number, flush=True)
"""

LIMITED_WRITER = """
import resource, sys
from gradguard.records import StepOutcome, StepRecord
from gradguard.rundir import RunDirectory, RunDirectoryError

limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    run = RunDirectory.create(sys.argv[1])
    for number in range(1000):
        run.write_record(StepRecord(step=number, optimizer="main", outcome=StepOutcome.APPLIED))
except RunDirectoryError as error:
    sys.exit(str(error))
"""


def step(number=0, **readings):
    """Build a record of one applied step."""
    return StepRecord(step=number, optimizer="main", outcome=StepOutcome.APPLIED, **readings)


def write_steps(path, number):
    """Write a run of so many steps and return its ``steps.jsonl``."""
    with RunDirectory.create(path) as run:
        for index in range(number):
            run.write_record(step(index))
    return path / STEPS_NAME


def limited_run(path, limit):
    """Record in a process that may write no file beyond ``limit`` bytes; return its last words."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", LIMITED_WRITER, str(path), str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    return done.stderr.strip()


@settings(max_examples=30, deadline=None)
@given(st.lists(records | findings, max_size=4))
def test_a_run_comes_back_as_it_was_recorded(entries):
    """Records and findings, in any order, are read back bit for bit and without a problem."""
    with tempfile.TemporaryDirectory() as folder:
        with RunDirectory.create(Path(folder, "run")) as run:
            for entry in entries:
                run.write(entry)
        back = read_run(Path(folder, "run"))
    assert bits(tuple(back.log)) == bits(tuple(e for e in entries if isinstance(e, StepRecord)))
    assert back.log.findings == tuple(e for e in entries if isinstance(e, Finding))
    assert back.problems == ()


def test_the_description_tells_what_ran_when_and_with_what(tmp_path):
    """run.json is strict JSON with kind, UTC time, versions, platform and the configuration."""
    config = {"preset": "smoke", "optimizer": {"rates": (1e-3, 4e-3), "clip": math.inf}, "seed": 0}
    RunDirectory.create(tmp_path / "new" / "run", config=config, kind="evaluation").close()
    meta = read_run(tmp_path / "new" / "run").meta
    assert meta.kind == "evaluation"
    assert meta.created_utc.endswith("+00:00")
    assert set(meta.versions) == {"python", "torch", "gradguard"}
    assert meta.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert meta.config == {
        "preset": "smoke",
        "optimizer": {"rates": [1e-3, 4e-3], "clip": "Infinity"},
        "seed": 0,
    }
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == [META_NAME, STEPS_NAME]


def test_a_run_can_be_read_while_it_is_written(tmp_path):
    """Every record is in the file as soon as the call that wrote it returns."""
    with RunDirectory.create(tmp_path / "run") as run:
        for number in range(3):
            run.write_record(step(number))
            assert len(read_run(tmp_path / "run").log) == number + 1 == run.entries


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"path": Path("x")}, r"config\.path: .*got a "),
        ({"a": [{"b": (1, object())}]}, r"config\.a\[0\]\.b\[1\]: .*got a object"),
        ({"a": {1: 2}}, r"config\.a: expected names that are strings, got 1"),
    ],
)
def test_a_configuration_without_a_json_form_is_refused_with_its_place(tmp_path, config, place):
    """What cannot be written is named, and no directory is made."""
    with pytest.raises(RunDirectoryError, match=rf"^cannot start a run: .*{place}"):
        RunDirectory.create(tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_never_written_to(tmp_path):
    """A second run in the same place is refused, tells what lies there, and changes nothing."""
    steps = write_steps(tmp_path / "run", 2)
    before = steps.read_bytes()
    with pytest.raises(RunDirectoryError, match=r"already holds run\.json, steps\.jsonl; choose"):
        RunDirectory.create(tmp_path / "run")
    assert steps.read_bytes() == before
    for number in range(5):
        (tmp_path / f"photo{number}").touch()
    with pytest.raises(RunDirectoryError, match="photo0, photo1, photo2 and 3 more; choose"):
        RunDirectory.create(tmp_path)


def test_a_place_that_is_no_directory_is_refused(tmp_path):
    """A file in the place of the directory, or of its parent, is one clear sentence."""
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            RunDirectoryError, match=r"^cannot start a run in .*; choose a directory"
        ):
            RunDirectory.create(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_closed_run_takes_no_more_records(tmp_path):
    """Writing after the end is an error and leaves the file alone; closing twice is fine."""
    run = RunDirectory.create(tmp_path / "run")
    run.write_record(step())
    run.close()
    run.close()
    with pytest.raises(RunDirectoryError, match="it was closed; create another run directory"):
        run.write_record(step(1))
    assert len(read_run(tmp_path / "run").log) == 1


def test_a_block_that_raises_closes_the_run(tmp_path):
    """The user's exception comes through, and what was recorded before it is there."""
    run = RunDirectory.create(tmp_path / "run")

    def train():
        with run:
            run.write_finding(Finding(code=RECORDING_FAULT, severity=Severity.INFO, message="x"))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train()
    assert len(read_run(tmp_path / "run").log.findings) == 1
    with pytest.raises(RunDirectoryError, match="closed"):
        run.write_record(step())


def test_a_record_that_cannot_be_written_leaves_the_run_open(tmp_path):
    """A record of wrong values is refused whole, and the next good one is recorded."""
    with RunDirectory.create(tmp_path / "run") as run:
        with pytest.raises(RunLogError, match="loss: expected a number"):
            run.write_record(step(0, loss="low"))
        run.write_record(step(1))
    assert [record.step for record in read_run(tmp_path / "run").log] == [1]


@needs_full_device
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    """On a device without space recording stops for good, and all earlier records are readable."""
    run = RunDirectory.create(tmp_path / "run")
    run.write_record(step(0))
    run.write_record(step(1))
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, run._stream.fileno())  # the same file descriptor, now on a disk with no space
    os.close(full)
    with pytest.raises(RunDirectoryError, match=r"No space left on device; .* 2 entries are safe"):
        run.write_record(step(2))
    with pytest.raises(RunDirectoryError, match=r"No space left on device; recording stopped"):
        run.write_record(step(3))
    run.close()
    back = read_run(tmp_path / "run")
    assert [record.step for record in back.log] == [0, 1]
    assert back.problems == ()


@posix_only
@pytest.mark.parametrize("limit", [2000, 5000])
def test_a_line_written_in_part_is_cut_off_again(tmp_path, limit):
    """Where the kernel takes only part of a line, the file ends with the last whole record."""
    sentence = limited_run(tmp_path / "run", limit)
    back = read_run(tmp_path / "run")
    length = len(to_line(step(0))) + 1
    assert len(back.log) == limit // length > 0
    assert limit % length != 0  # the limit falls inside a line
    assert back.problems == ()
    assert "File too large; recording stopped" in sentence
    assert f"{len(back.log)} entries are safe there, make room" in sentence
    assert "\n" not in sentence


@posix_only
def test_no_room_for_the_description_leaves_an_empty_directory(tmp_path):
    """When run.json cannot be written, nothing of it stays behind and the place can be used again."""
    sentence = limited_run(tmp_path / "run", 10)
    assert "run.json: File too large; nothing was recorded" in sentence
    assert list((tmp_path / "run").iterdir()) == []
    RunDirectory.create(tmp_path / "run").close()


@posix_only
def test_a_killed_process_leaves_every_acknowledged_record(tmp_path):
    """After SIGKILL the directory is readable and holds at least what the writer had reported."""
    command = [sys.executable, "-B", "-c", ENDLESS_WRITER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        for _ in range(50):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
    back = read_run(tmp_path / "run")
    steps = [record.step for record in back.log]
    assert steps == list(range(len(steps)))
    assert len(steps) > acknowledged


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_keeps_every_whole_line(data):
    """Whatever byte a file ends at, the records before it are read, and a torn one is told."""
    with tempfile.TemporaryDirectory() as folder:
        steps = write_steps(Path(folder, "run"), 3)
        whole = steps.read_bytes()
        cut = data.draw(st.integers(min_value=0, max_value=len(whole)))
        steps.write_bytes(whole[:cut])
        back = read_run(Path(folder, "run"))
    lines = whole[:cut].split(b"\n")
    complete = [line for line in whole.split(b"\n") if line and line in lines]
    assert len(back.log) == len(complete)
    assert len(back.problems) == (lines[-1] != b"" and lines[-1] not in complete)


@pytest.mark.parametrize(
    "tail", [b"\0" * 64, b"\xff\xfe", b"{}x\n", b"[1, 2]", pickle.dumps(print)]
)
def test_a_last_line_of_rubbish_is_told_and_left_out(tmp_path, tail):
    """Zeros of a power cut, bytes that are no text, and even a pickle are a problem, not an error."""
    steps = write_steps(tmp_path / "run", 2)
    steps.write_bytes(steps.read_bytes() + tail)
    back = read_run(tmp_path / "run")
    assert len(back.log) == 2
    assert "line 3 of" in back.problems[0]
    assert "the 2 entries before it were read" in back.problems[0]


@pytest.mark.parametrize("middle", [b'{"kind":"st\n', b"\n", b"\xff\n", b"NaN\n"])
def test_a_torn_line_before_the_last_is_an_error(tmp_path, middle):
    """A hole in the middle cannot come from a killed process: it is named and nothing is guessed."""
    steps = write_steps(tmp_path / "run", 2)
    first, second, _ = steps.read_bytes().split(b"\n")
    steps.write_bytes(first + b"\n" + middle + second + b"\n")
    with pytest.raises(RunDirectoryError, match=r"^line 2 of .*steps\.jsonl: not "):
        read_run(tmp_path / "run")


def test_a_whole_line_of_another_version_is_an_error_even_at_the_end(tmp_path):
    """A line that is JSON is not torn: an unknown schema or field is never skipped over."""
    steps = write_steps(tmp_path / "run", 1)
    steps.write_bytes(steps.read_bytes() + b'{"kind":"step","schema":99}')
    with pytest.raises(
        RunDirectoryError, match=r"^line 2 of .* has schema 99, this gradguard reads"
    ):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no run\.json; pass a directory that a gradguard run wrote"),
        (b"", r"run\.json: it is not JSON"),
        (b'{"format": "gradguard-run", "sch', r"run\.json: it is not JSON"),
        (b"\xff\xff", r"run\.json: it is not text"),
        (b"[]", r"run\.json: it was not written by gradguard"),
        (b'{"accuracy": 1}', r"run\.json: it was not written by gradguard"),
        (b'{"format": "gradguard-run", "schema": 7}', "schema 7, this gradguard reads 1"),
        (b'{"format": "gradguard-run", "schema": 1}', "describe a run .*needs the field 'kind'"),
    ],
)
def test_a_description_that_is_missing_torn_or_foreign_is_an_error(tmp_path, content, message):
    """Only a directory whose run.json is ours, whole and of this version is read."""
    write_steps(tmp_path / "run", 1)
    (tmp_path / "run" / META_NAME).unlink()
    if content is not None:
        (tmp_path / "run" / META_NAME).write_bytes(content)
    with pytest.raises(RunDirectoryError, match=message) as caught:
        read_run(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_path_without_a_run_is_an_error(tmp_path):
    """A missing directory, a file, and directories in the place of files are one sentence each."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(RunDirectoryError, match="no such directory; pass a run directory"):
            read_run(path)
    for name in (STEPS_NAME, META_NAME):
        write_steps(tmp_path / name, 0)
        (tmp_path / name / name).unlink()
        (tmp_path / name / name).mkdir()
        with pytest.raises(RunDirectoryError, match=r"^cannot read .*: Is a directory"):
            read_run(tmp_path / name)


def test_a_run_without_a_records_file_is_empty_and_says_so(tmp_path):
    """A missing steps.jsonl is a problem that is told, not a crash."""
    write_steps(tmp_path / "run", 1).unlink()
    back = read_run(tmp_path / "run")
    assert len(back.log) == 0
    assert "is missing: no record was read" in back.problems[0]


def test_the_description_is_for_other_tools_too(tmp_path):
    """run.json is indented JSON that names its format and its schema version."""
    write_steps(tmp_path / "run", 0)
    fields = json.loads((tmp_path / "run" / META_NAME).read_text(encoding="ascii"))
    assert (fields["format"], fields["schema"]) == ("gradguard-run", 1)

"""The command line: help for every option, and one sentence for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reference_trainer import cli
from reference_trainer.config import PRESETS
from reference_trainer.settings import config_keys

TINY = [
    "--preset",
    "smoke",
    "--set",
    "scenes.train=2",
    "--set",
    "scenes.validation=1",
    "--set",
    "optimization.batch_scenes=2",
    "--set",
    "runtime.device=cpu",
    "--set",
    "runtime.state_every=100",
]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process; return exit status, output and error output."""
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one sentence on standard error of a command that must fail with status 2."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_help_explains_every_option_and_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``train --help`` lists the options, every preset and every setting with its meaning."""
    monkeypatch.setenv("COLUMNS", "120")
    status, out, _ = run(capsys, "train", "--help")
    assert status == 0
    for option in ("--preset", "--set", "--precision", "--init-scale", "--epochs", "--run-dir"):
        assert option in out
    words = " ".join(out.split())
    for key in config_keys():
        assert key.name in words
        assert " ".join(key.meaning.split()) in words
    assert all(name in words for name in PRESETS)


def test_a_run_ends_with_the_whole_story(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The counts, one outcome line a step, epoch lines with both sets, and the summary; then the
    checkpoint evaluates to the same figures.
    """
    directory = tmp_path / "run"
    status, out, err = run(capsys, "train", *TINY, "--run-dir", str(directory))
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "93 tensors, 16,339,075 parameters, 93 live" in lines
    assert sum("APPLIED" in line for line in lines) == 2
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 3
    assert all("memorised" in line and "held out" in line for line in epochs)
    assert "Summary of the run" in out
    assert "covariance NMSE" in out
    assert "\x1b" not in out
    few = ["--scenes", "1"]
    status, again, _ = run(capsys, "evaluate", str(directory / "checkpoint.pt"), *few)
    assert status == 0
    assert again.splitlines()[0].split("memorised")[1] == epochs[-1].split("memorised")[1]


def test_short_options_win_over_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--epochs, --precision and --init-scale are settings by another name and apply last."""
    given = {}

    def remember(config: object, **_: object) -> None:
        given["config"] = config
        raise cli.TrainerError("enough")

    monkeypatch.setattr(cli, "train_network", remember)
    arguments = ["--epochs", "9", "--precision", "fp16", "--init-scale", "2**24"]
    complaint(capsys, "train", "--set", "optimization.epochs=3", *arguments)
    config = given["config"]
    assert config.optimization.epochs == 9
    assert config.precision.mode == "fp16"
    assert config.precision.initial_loss_scale == 2.0**24


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--preset", "nothing"], "known are overfit, production, smoke"),
        (["--set", "optimization.epoch=3"], "did you mean 'optimization.epochs'"),
        (["--set", "optimization.epochs"], "write section.key=value"),
        (["--epochs", "many"], "setting optimization.epochs: got 'many'"),
        (["--precision", "fp8"], "expected 'fp32', 'bf16' or 'fp16'"),
        (["--init-scale", "2**24"], "has no effect in fp32"),
        (["--init-scale", "big"], "initial_loss_scale: got 'big'"),
    ],
)
def test_a_mistake_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """Status 2, nothing on standard output, and one sentence with what came and what to do."""
    assert told in complaint(capsys, "train", *arguments)


def test_a_run_directory_in_use_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A directory that holds files is refused before anything is computed, and left alone."""
    (tmp_path / "mine.txt").write_text("precious")
    told = complaint(capsys, "train", *TINY, "--run-dir", str(tmp_path))
    assert "already holds mine.txt" in told
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04torn"])
def test_an_unreadable_checkpoint_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None
) -> None:
    """A missing, empty or torn checkpoint is told by name."""
    path = tmp_path / "checkpoint.pt"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in complaint(capsys, "evaluate", str(path))


def test_a_checkpoint_of_another_version_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A checkpoint whose configuration has settings unknown here is refused by that name."""
    path = tmp_path / "checkpoint.pt"
    content = {"format": "reference_trainer.checkpoint", "schema": 1, "weights": {}, "epoch": 1}
    rest = {"config": {"scenes": {"moon": 1}}, "steps_taken": 1, "validation_loss": 1.0}
    torch.save(content | rest, path)
    assert "no setting is called 'scenes.moon'" in complaint(capsys, "evaluate", str(path))


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from reference_trainer.cli import main
main(sys.argv[2:])
"""


def test_a_disk_that_fills_up_loses_nothing_recorded(tmp_path: Path) -> None:
    """Too little room for the checkpoint: status 2, one sentence, and the records so far can be
    read.
    """
    import gradguard as gg

    directory = tmp_path / "run"
    limit = 2_000_000  # room for records, none for 65 MB of weights
    command = [sys.executable, "-c", LIMITED, str(limit), "train", *TINY]
    done = subprocess.run(
        [*command, "--run-dir", str(directory)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: could not write the checkpoint")
    assert done.stderr.count("\n") == 1
    run_read = gg.read_run(directory)
    assert run_read.problems == ()
    assert len(run_read.log) == 2
    assert not (directory / "checkpoint.pt").exists()


@pytest.mark.parametrize("missing", ["pydantic", "scipy", "typer"])
def test_without_an_extra_one_line_says_what_to_install(missing):
    """Where a library of the trainer extra is missing, the command names it and exits with 1."""
    code = (
        f"import sys, runpy; sys.modules[{missing!r}] = None; sys.argv = ['reference_trainer']; "
        "runpy.run_module('reference_trainer', run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr == (
        f"error: the reference trainer needs {missing}; "
        "install it with: pip install gradguard[trainer]\n"
    )

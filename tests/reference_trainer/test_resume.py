"""A run that is killed and resumed ends in the bits of one that was not, and loses no record."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

import gradguard as gg
from reference_trainer import cli
from reference_trainer.checkpoint import load_checkpoint
from reference_trainer.epoch_lines import earlier_epochs, rewrite_epochs
from reference_trainer.errors import CheckpointError, RecordingError
from reference_trainer.reporting import SilentView
from reference_trainer.settings import preset, with_overrides
from reference_trainer.setup import assemble
from reference_trainer.train import resume, train
from reference_trainer.training_state import Position, load_state, put_back
from tests.reference_trainer.kills import finish, kill_after, kill_at_line, same_bits

if TYPE_CHECKING:
    from pathlib import Path

    from reference_trainer.config import Config
    from reference_trainer.results import EpochResult, TrainingResult

SETTINGS = [
    "scenes.train=6",
    "scenes.validation=2",
    "optimization.batch_scenes=1",
    "optimization.accumulation=2",
    "network.dropout=0.1",
    "runtime.device=cpu",
    "runtime.state_every=2",
    "guard.lag=1",
]
"""Two epochs of three steps with dropout; the state is saved after steps 2, 4 and 6."""


def config(*more: str) -> Config:
    """Return the run of ``SETTINGS``."""
    return with_overrides(preset("smoke"), [*SETTINGS, *more])


class Killed(BaseException):
    """Stands for a kill -9 inside one process: nothing may catch it."""


class Killer(SilentView):
    """Ends the run after so many epoch ends, or before the first step."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def epoch_ended(self, result: EpochResult) -> None:
        """Count it."""
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingResult, Path]:
    """Return the run that nobody killed."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    return train(config(), run_directory=directory), directory


def killed(directory: Path, epochs: int, *more: str) -> None:
    """Run until so many epochs have ended, number 0 included."""
    with pytest.raises(Killed):
        train(config(*more), run_directory=directory, view=Killer(epochs))


def epoch_numbers(directory: Path) -> list[int]:
    """Return the epochs on record."""
    lines = (directory / "epochs.jsonl").read_text().splitlines()
    return [json.loads(line)["epoch"] for line in lines]


def test_a_killed_process_resumes_to_the_same_bits(
    whole: tuple[TrainingResult, Path], tmp_path: Path
) -> None:
    """Killed -9 while it starts, before its first state, in the middle and while it resumes, in processes
    of their own: live weights, average, optimizer, random state, checkpoint and epochs are the same.
    """
    directory = tmp_path / "run"
    assert kill_after(directory, SETTINGS, 1.0)
    assert kill_at_line(directory, SETTINGS, "step", 1)
    assert not (directory / "state.pt").exists()
    assert kill_at_line(directory, SETTINGS, "epoch", 2)
    assert load_state(directory / "state.pt").position.windows == 2
    assert kill_after(directory, SETTINGS, 3.0)
    finish(directory, SETTINGS)
    assert same_bits(directory, whole[1])
    assert epoch_numbers(directory) == [0, 1, 2]


def test_a_resumed_run_tells_the_whole_story(
    whole: tuple[TrainingResult, Path], tmp_path: Path
) -> None:
    """Killed after the first epoch and resumed from the middle of it: every epoch is in the result
    as in the whole run, evaluated alike, and the guard finds nothing wrong with either part.
    """
    expected, uninterrupted = whole
    directory = tmp_path / "run"
    killed(directory, 2)
    assert load_state(directory / "state.pt").position.windows == 2
    shutil.copytree(directory, kept := tmp_path / "kept")
    result = resume(directory)
    assert same_bits(directory, uninterrupted)
    assert [one.epoch for one in result.epochs] == [0, 1, 2]
    assert result.epochs == expected.epochs
    assert (result.live, result.start.steps_taken) == (expected.live, 2)
    for log in (expected.log, result.log, gg.read_run(directory).log):
        assert log.findings == ()
        assert gg.diagnose(log).healthy
    assert len(gg.read_run(directory).log) == len(gg.read_run(kept).log) == 3
    part = gg.read_run(directory / "resumed-1")
    assert len(part.log) == 4
    assert part.meta.config["resumed_from"]["windows"] == 2
    repeated, first = part.log[0], gg.read_run(directory).log[2]
    assert (repeated.loss, repeated.gradient_norm) == (first.loss, first.gradient_norm)


def test_a_finished_run_is_only_judged(whole: tuple[TrainingResult, Path], tmp_path: Path) -> None:
    """Resuming a finished run changes no file and tells its result again."""
    expected, directory = whole[0], tmp_path / "run"
    shutil.copytree(whole[1], directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    result = resume(directory)
    assert result.epochs == expected.epochs
    assert result.live == expected.live
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_the_loss_scale_goes_on_too(tmp_path: Path) -> None:
    """In fp16, with a scale that grows after two good steps, one of them before the break."""
    more = ["precision.mode=fp16", "precision.growth_interval=2", "scenes.train=2"]
    more += ["precision.initial_loss_scale=1024", "runtime.state_every=100"]
    more += ["runtime.checkpoint_every=1"]
    expected = train(config(*more))
    killed(tmp_path / "run", 2, *more)
    result = resume(tmp_path / "run")
    assert all(map(torch.equal, result.model.parameters(), expected.model.parameters()))
    assert load_state(tmp_path / "run" / "state.pt").scaler["scale"] == 2048.0


def test_a_state_is_read_without_unpickling_and_whole_or_not_at_all(
    whole: tuple[TrainingResult, Path], tmp_path: Path
) -> None:
    """Torn and foreign states are one sentence each, and so is a checkpoint in their place."""
    content = (whole[1] / "state.pt").read_bytes()
    path = tmp_path / "state.pt"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is no whole training state"):
        load_state(path)
    with pytest.raises(CheckpointError, match="is no training state of this trainer"):
        load_state(whole[1] / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="is no checkpoint of this trainer"):
        load_checkpoint(whole[1] / "state.pt")


def test_a_state_of_more_processes_is_refused(whole: tuple[TrainingResult, Path]) -> None:
    """One process cannot go on with the random states of two: the sentence says how to start it."""
    state = load_state(whole[1] / "state.pt")
    parts = assemble(config(), torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"--nproc-per-node 2, or its weights"):
        put_back(replace(state, random=state.random * 2), parts, None)


def test_a_state_of_another_network_is_refused(whole: tuple[TrainingResult, Path]) -> None:
    """A tensor that is missing or left over is told by name."""
    state = load_state(whole[1] / "state.pt")
    parts = assemble(config(), torch.device("cpu"))
    weights = {name: value for name, value in state.weights.items() if name != "fusion.bias"}
    with pytest.raises(CheckpointError, match=r"of another network: .*fusion\.bias"):
        put_back(replace(state, weights=weights), parts, None)


def test_epochs_survive_the_disk_once_each(
    whole: tuple[TrainingResult, Path], tmp_path: Path
) -> None:
    """Read back they are what was recorded, NaN and all; a torn last line and lines after the state
    are dropped; a line that is no JSON is one sentence.
    """
    result, state = whole[0], load_state(whole[1] / "state.pt")
    strange = [replace(one, training_loss=float("nan")) for one in result.epochs]
    rewrite_epochs(tmp_path, tuple(strange))
    path = tmp_path / "epochs.jsonl"
    text = path.read_text()
    assert repr(list(earlier_epochs(tmp_path, state, config()))) == repr(strange)
    path.write_text(text[:-5])
    assert repr(list(earlier_epochs(tmp_path, state, config()))) == repr(strange[:2])
    middle = replace(state, position=Position(epoch=0, windows=2))
    assert repr(list(earlier_epochs(tmp_path, middle, config()))) == repr(strange[:1])
    path.write_text(text.replace('"epoch": 0', '"epoch"'))
    with pytest.raises(RecordingError, match=r"line 1 of .*epochs.jsonl is no JSON"):
        earlier_epochs(tmp_path, state, config())


@pytest.mark.parametrize("there", [False, True])
def test_a_directory_without_a_run_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, there: bool
) -> None:
    """``resume`` of a directory that does not exist or holds no run ends with status 2."""
    directory = tmp_path / "nothing"
    if there:
        directory.mkdir()
    with pytest.raises(SystemExit) as left:
        cli.main(["resume", str(directory)])
    told = capsys.readouterr()
    assert (left.value.code, told.out, told.err.count("\n")) == (2, "", 1)
    assert told.err.startswith("error: ")

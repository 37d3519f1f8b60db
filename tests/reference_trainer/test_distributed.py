"""Several processes train as one: shares that add up, and a real run of two under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradguard as gg
from reference_trainer.checkpoint import load_checkpoint
from reference_trainer.processes import ALONE, Processes, joined_processes
from reference_trainer.settings import preset, with_overrides
from reference_trainer.setup import assemble
from reference_trainer.train import train
from reference_trainer.training_state import load_state

if TYPE_CHECKING:
    from pathlib import Path

    from reference_trainer.results import TrainingResult

SETTINGS = [
    "scenes.train=7",
    "scenes.validation=3",
    "optimization.batch_scenes=3",
    "optimization.accumulation=2",
    "optimization.epochs=2",
    "runtime.device=cpu",
    "runtime.state_every=100",
]
"""Batches of 3, 3 and 1 scenes in windows of two: unequal shares, and one process without a scene."""


@given(scenes=st.integers(1, 40), count=st.integers(2, 9))
def test_shares_hold_every_scene_once_and_weigh_right(scenes: int, count: int) -> None:
    """The parts of all processes are the batch in order; what they stand for adds up to as many
    scenes for each process, so that a mean over processes is the mean over scenes.
    """
    index = torch.arange(scenes) * 3
    shares = [Processes(rank, count).share(index) for rank in range(count)]
    taken = [part for part, stands_for in shares if stands_for]
    assert torch.equal(torch.cat(taken), index)
    assert sum(stands_for for _, stands_for in shares) == count * scenes
    loss = index.double().square()
    means = [stands_for * loss[part // 3].mean() for part, stands_for in shares]
    assert torch.stack(means).mean().item() == pytest.approx(scenes * loss.mean().item())
    assert all(len(part) for part, _ in shares)


def test_one_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun there is nothing to join, and every method gives back what it was given."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_processes(torch.device("cpu")) as processes:
        assert processes == ALONE
    value, model = torch.ones(2), torch.nn.Linear(1, 1)
    assert ALONE.share(value) == (value, 2)
    assert ALONE.mean(value) is value
    assert ALONE.replicate(model, some_unused=False) is model
    assert ALONE.agree("runs/1") == "runs/1"
    assert torch.equal(ALONE.collect(value)[0], value)


def torchrun(*arguments: str) -> str:
    """Run the trainer in two processes; return what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "reference_trainer", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the directory of a run of two processes, and what they printed."""
    directory = tmp_path_factory.mktemp("together") / "run"
    given = [part for setting in SETTINGS for part in ("--set", setting)]
    told = torchrun("train", "--preset", "smoke", *given, "--run-dir", str(directory))
    return directory, told


@pytest.fixture(scope="module")
def alone() -> TrainingResult:
    """Return the same run in one process."""
    return train(with_overrides(preset("smoke"), SETTINGS))


def test_two_processes_train_as_one(together: tuple[Path, str], alone: TrainingResult) -> None:
    """Losses, gradient norms and evaluations are those of one process with the same global batch, to
    float tolerance, although the last batch leaves one process without a scene.
    """
    directory, _ = together
    lines = (directory / "epochs.jsonl").read_text().splitlines()
    for line, expected in zip(map(json.loads, lines), alone.epochs, strict=True):
        assert line["steps_taken"] == expected.steps_taken
        if expected.epoch:
            assert line["training_loss"] == pytest.approx(expected.training_loss, rel=2e-4)
        for name, seen in (("memorised", expected.memorised), ("held_out", expected.held_out)):
            assert line[name]["loss"] == pytest.approx(seen.loss, rel=2e-4)
            accuracy = line[name]["source_count_accuracy"]
            assert accuracy == pytest.approx(seen.source_count_accuracy)
    for record, expected in zip(gg.read_run(directory).log, alone.log, strict=True):
        norms = record.gradient_norm_before_clipping, expected.gradient_norm_before_clipping
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    first = gg.read_run(directory).log[0], alone.log[0]
    norms = [record.gradient_norm_before_clipping for record in first]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_two_processes_end_in_the_weights_of_one(
    together: tuple[Path, str], alone: TrainingResult
) -> None:
    """The averaged weights are as near those of one process as rounding allows: Adam moves where the
    gradient is nothing but rounding, too, so the moves are compared as a whole.
    """
    saved = load_checkpoint(together[0] / "checkpoint.pt").weights
    begun = assemble(with_overrides(preset("smoke"), SETTINGS), torch.device("cpu")).model
    parameters = list(alone.model.named_parameters())
    apart = torch.cat([(value - saved[name]).flatten() for name, value in parameters])
    start = torch.nn.utils.parameters_to_vector(begun.parameters())
    moved = torch.nn.utils.parameters_to_vector(alone.model.parameters()) - start
    assert apart.norm() < 0.02 * moved.norm()


def test_the_guards_of_all_processes_agree(together: tuple[Path, str]) -> None:
    """Every process records its own steps; outcomes are the same, nothing is found, and judged
    together they are healthy replicas.
    """
    logs = [gg.read_run(together[0] / place).log for place in ("", "rank1")]
    outcomes = [[record.outcome for record in log] for log in logs]
    assert outcomes[0] == outcomes[1] == [gg.StepOutcome.APPLIED] * 4
    for log in logs:
        assert log.findings == ()
        assert gg.diagnose(log).healthy
    judged = subprocess.run(
        [sys.executable, "-m", "gradguard", "check", together[0], together[0] / "rank1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert judged.returncode == 0, judged.stdout


def test_only_the_first_process_speaks(together: tuple[Path, str]) -> None:
    """Every line is told once, and the run says how many processes it has."""
    told = together[1].splitlines()
    assert sum(line.startswith("epoch ") for line in told) == 3
    assert sum("2 processes" in line for line in told) == 1
    assert len(load_state(together[0] / "state.pt").random) == 2

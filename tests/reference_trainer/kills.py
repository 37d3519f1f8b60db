"""Runs of the trainer in processes of their own that are killed, resumed and killed again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import torch

from reference_trainer.training_state import load_state

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(directory: Path, settings: Sequence[str]) -> list[str]:
    """Return what starts the run in ``directory``, or goes on with it."""
    head = [sys.executable, "-m", "reference_trainer"]
    if (directory / "run.json").exists():
        return [*head, "resume", str(directory)]
    given = [part for setting in settings for part in ("--set", setting)]
    return [*head, "train", "--preset", "smoke", *given, "--run-dir", str(directory)]


def start(directory: Path, settings: Sequence[str]) -> subprocess.Popen[str]:
    """Start or resume the run; a directory in which nothing has begun is made anew."""
    if not (directory / "run.json").exists() and directory.exists():
        for leftover in directory.iterdir():
            leftover.unlink()
        directory.rmdir()
    return subprocess.Popen(
        command(directory, settings),
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(directory: Path, settings: Sequence[str]) -> None:
    """Let the run go to its end."""
    process = start(directory, settings)
    told, _ = process.communicate()
    assert process.returncode == 0, told


def kill_after(directory: Path, settings: Sequence[str], delay_s: float) -> bool:
    """Start or resume the run and kill -9 it after ``delay_s``; return whether it was still going."""
    process = start(directory, settings)
    try:
        process.communicate(timeout=delay_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    assert process.returncode == 0
    return False


def kill_at_line(directory: Path, settings: Sequence[str], begin: str, count: int) -> bool:
    """Kill -9 the run when it has printed ``count`` lines that begin so; return whether it did."""
    process = start(directory, settings)
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += line.startswith(begin)
        if seen == count:
            process.kill()
            break
    process.communicate()
    return seen == count


def final_tensors(directory: Path) -> dict[str, Tensor]:
    """Return live weights, averaged weights and optimizer state at the end of a run."""
    state = load_state(directory / "state.pt")
    assert state.position.finished
    return dict(_named("", [state.weights, state.average, state.optimizer, state.random]))


def same_bits(one: Path, other: Path) -> bool:
    """Return whether two runs ended in the same bits, checkpoints and recorded epochs included."""
    first, second = final_tensors(one), final_tensors(other)
    tensors = first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )
    lines = [(path / "epochs.jsonl").read_text() for path in (one, other)]
    weights = [torch.load(path / "checkpoint.pt", weights_only=True) for path in (one, other)]
    saved = all(
        torch.equal(value, weights[1]["weights"][name])
        for name, value in weights[0]["weights"].items()
    )
    return tensors and saved and lines[0] == lines[1]


def timed(directory: Path, settings: Sequence[str]) -> float:
    """Run to the end; return how long it took."""
    began_s = time.monotonic()
    finish(directory, settings)
    return time.monotonic() - began_s


def _named(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from _named(f"{name}.{number}", part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _named(f"{name}.{key}", part)

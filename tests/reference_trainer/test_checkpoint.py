"""Checkpoints: whole or not at all, and never unpickled."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from reference_trainer.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from reference_trainer.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

CHECKPOINT = Checkpoint(
    config={"optimization": {"epochs": 60, "clip_norm": 1.0}},
    weights=nn.Linear(3, 2).state_dict(),
    epoch=7,
    steps_taken=28,
    validation_loss=float("nan"),
)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Compare bit for bit; NaN equals NaN."""
    tensors = one.weights.keys() == other.weights.keys() and all(
        torch.equal(value, other.weights[name]) for name, value in one.weights.items()
    )
    plain = [repr(replace(checkpoint, weights={})) for checkpoint in (one, other)]
    return tensors and plain[0] == plain[1]


def test_a_checkpoint_survives_the_disk(tmp_path: Path) -> None:
    """What is read back is what was saved, bit for bit, NaN losses included."""
    save_checkpoint(tmp_path / "c.pt", CHECKPOINT)
    assert same(load_checkpoint(tmp_path / "c.pt"), CHECKPOINT)
    assert os.listdir(tmp_path) == ["c.pt"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.data())
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    """Cut anywhere, or with any bytes changed: a clear refusal, or exactly what was saved."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, CHECKPOINT)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    read = told = None
    try:
        read = load_checkpoint(path)
    except CheckpointError as error:
        told = str(error)
    if read is None:
        assert told is not None
        assert str(path) in told
        assert "\n" not in told
    else:
        assert same(read, CHECKPOINT)


@given(st.binary(max_size=200))
@example(b"")
@example(pickle.dumps({"format": "reference_trainer.checkpoint"}))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """A file of something else is refused with its name."""
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_checkpoint(path)


class Touch:
    """Pickles to a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_nothing_in_it_is_executed(tmp_path: Path) -> None:
    """A file made to run code when unpickled is refused, and the code does not run."""
    torch.save(
        {"format": "reference_trainer.checkpoint", "x": Touch(tmp_path / "ran")}, tmp_path / "c.pt"
    )
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"weights": {}}, "is no checkpoint of this trainer"),
        ([1, 2], "is no checkpoint of this trainer"),
        ({"format": "reference_trainer.checkpoint", "schema": 99}, "has schema 99"),
        ({"format": "reference_trainer.checkpoint", "schema": 1}, "lacks config, epoch"),
    ],
)
def test_a_foreign_torch_file_is_refused(tmp_path: Path, content: object, told: str) -> None:
    """Other torch files, other schemas and unfinished ones are refused, each with its reason."""
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(tmp_path / "c.pt")


def test_a_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    """A path that does not exist, or is a directory, is told as such."""
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="Is a directory"):
        load_checkpoint(tmp_path)


def test_weights_of_another_network_are_refused() -> None:
    """Loading is strict: missing tensors or other shapes are an error in one line."""
    with pytest.raises(CheckpointError, match=r"holds another model: .* size mismatch") as caught:
        load_weights(nn.Linear(4, 2), CHECKPOINT)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """No space left: one sentence, the earlier checkpoint is whole, no half file stays."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, CHECKPOINT)
    (tmp_path / ".c.pt.partial").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"No space left on device.*unchanged"):
        save_checkpoint(path, replace(CHECKPOINT, epoch=8))
    assert same(load_checkpoint(path), CHECKPOINT)
    assert os.listdir(tmp_path) == ["c.pt"]

"""Checkpoints: the weights that were validated, with the configuration of their run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference_trainer.errors import CheckpointError
from reference_trainer.files import load_file, save_file

FORMAT = "reference_trainer.checkpoint"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The weights that were validated, and where in which run that was.

    Attributes:
        config: the whole configuration of the run, as nested plain values.
        weights: state dict of the model that was validated (the averaged weights).
        epoch: epochs finished.
        steps_taken: optimizer steps taken; skipped and vetoed ones do not count.
        validation_loss: loss of these very weights on the held-out scenes.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    epoch: int
    steps_taken: int
    validation_loss: float


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that ``path`` holds either the old file or the whole new one.

    Sync: waits for the device once per tensor.

    Raises:
        CheckpointError: the file could not be written; a previous one is left as it was.
    """
    head = {"format": FORMAT, "schema": SCHEMA_VERSION}
    save_file(path, head | _plain(checkpoint), kind="checkpoint")


def load_checkpoint(path: Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint and check that it is one.

    Raises:
        CheckpointError: there is no such file, or it is torn, foreign or of another version.
    """
    content = load_file(
        path,
        kind="checkpoint",
        file_format=FORMAT,
        schema=SCHEMA_VERSION,
        names=[field.name for field in fields(Checkpoint)],
        device=device,
    )
    return Checkpoint(**content)


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the weights of a checkpoint into ``model``; every tensor must match by name and shape.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    try:
        model.load_state_dict(dict(checkpoint.weights), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint holds another model: {reason}") from error


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    return content | {"config": dict(checkpoint.config), "weights": dict(checkpoint.weights)}

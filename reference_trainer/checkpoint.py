"""Checkpoints: written atomically, read without unpickling anything but tensors and plain values."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference_trainer.errors import CheckpointError

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
    content = {"format": FORMAT, "schema": SCHEMA_VERSION} | _plain(checkpoint)
    buffer = io.BytesIO()  # torch's own file writer turns "no space left" into an opaque error
    torch.save(content, buffer)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        _write_durably(temporary, buffer.getbuffer())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"could not write the checkpoint {path} ({error.strerror or error}); any earlier checkpoint of "
            "that name is unchanged. Free some space or choose another --run-dir"
        ) from error


def load_checkpoint(path: Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint and check that it is one.

    Raises:
        CheckpointError: there is no such file, or it is torn, foreign or of another version.
    """
    content = _read(path, device)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of this trainer: it lacks format {FORMAT!r}; "
            "pass a file written by `python -m reference_trainer train`"
        )
    if content.get("schema") != SCHEMA_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has schema {content.get('schema')!r}, this version reads "
            f"{SCHEMA_VERSION}; read it with the version that wrote it"
        )
    names = {field.name for field in fields(Checkpoint)}
    if missing := sorted(names - content.keys()):
        raise CheckpointError(f"checkpoint {path} lacks {', '.join(missing)}; it was not finished")
    return Checkpoint(**{name: content[name] for name in names})


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


def _write_durably(path: Path, content: memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, device: torch.device | str) -> object:
    try:
        _check_integrity(path)
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"could not read the checkpoint {path}: {error.strerror or error}"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is no whole checkpoint ({error}); it was cut short, changed or written by "
            "something else: use another one"
        ) from error


_DAMAGE = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError)


def _check_integrity(path: Path) -> None:
    """Compare every member with its checksum; torch's reader trusts the bytes of the tensors."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"checksum of {damaged} does not match")

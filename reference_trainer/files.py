"""Files of tensors and plain values: written atomically, read without unpickling anything else."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import torch

from reference_trainer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


def save_file(path: Path, content: Mapping[str, Any], *, kind: str) -> None:
    """Write ``content`` so that ``path`` holds either the old file or the whole new one.

    Args:
        path: where to.
        content: tensors and plain values, nested in dicts and lists.
        kind: what to call the file in a message.

    Sync: waits for the device once per tensor.

    Raises:
        CheckpointError: the file could not be written; a previous one is left as it was.
    """
    buffer = io.BytesIO()  # torch's own file writer turns "no space left" into an opaque error
    torch.save(dict(content), buffer)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        _write_durably(temporary, buffer.getbuffer())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"could not write the {kind} {path} ({error.strerror or error}); any earlier {kind} of "
            "that name is unchanged. Free some space or choose another --run-dir"
        ) from error


def load_file(
    path: Path,
    *,
    kind: str,
    file_format: str,
    schema: int,
    names: Iterable[str],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Read what :func:`save_file` wrote, and check that it is whole and of the kind wanted.

    Args:
        path: the file.
        kind: what to call the file in a message.
        file_format: expected under ``"format"``.
        schema: expected under ``"schema"``.
        names: keys that must be there; only these are returned.
        device: where the tensors go.

    Raises:
        CheckpointError: there is no such file, or it is torn, foreign or of another version.
    """
    content = _read(path, kind, device)
    if not isinstance(content, dict) or content.get("format") != file_format:
        raise CheckpointError(
            f"{path} is no {kind} of this trainer: it lacks format {file_format!r}; "
            "pass a file written by `python -m reference_trainer train`"
        )
    if content.get("schema") != schema:
        raise CheckpointError(
            f"{kind} {path} has schema {content.get('schema')!r}, this version reads "
            f"{schema}; read it with the version that wrote it"
        )
    wanted = tuple(names)
    if missing := sorted(set(wanted) - content.keys()):
        raise CheckpointError(f"{kind} {path} lacks {', '.join(missing)}; it was not finished")
    return {name: content[name] for name in wanted}


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


def _read(path: Path, kind: str, device: torch.device | str) -> object:
    try:
        _check_integrity(path)
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"could not read the {kind} {path}: {error.strerror or error}"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is no whole {kind} ({error}); it was cut short, changed or written by "
            "something else: use another one"
        ) from error


_DAMAGE = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError)


def _check_integrity(path: Path) -> None:
    """Compare every member with its checksum; torch's reader trusts the bytes of the tensors."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"checksum of {damaged} does not match")

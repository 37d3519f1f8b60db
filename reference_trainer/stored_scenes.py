"""Scenes written once to a directory, and opened by mapping the files into memory.

One raw little-endian ``.npy`` file for every tensor of :class:`~reference_trainer.scenes.Scenes`, and
``scenes.json``, written last, which says what they are and holds a checksum of each file.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reference_trainer.errors import DataError
from reference_trainer.scenes import Scenes, Split, draw_scenes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from io import BufferedWriter
    from pathlib import Path

    from torch import Tensor

    from reference_trainer.physics import ScenePhysics

FORMAT = "reference_trainer.scenes"
SCHEMA_VERSION = 1
MANIFEST_NAME = "scenes.json"
_CHUNK = 256  # scenes drawn and written at a time
_BLOCK_BYTES = 1 << 20
_NAMES = tuple(field.name for field in fields(Scenes))


def write_scenes(
    directory: Path,
    physics: ScenePhysics,
    *,
    seed: int,
    split: Split,
    count: int,
    written: Callable[[int], None] = lambda _: None,
) -> None:
    """Draw the first ``count`` scenes of a split and write them to a new or empty directory.

    Args:
        directory: where to; made with its parents.
        physics: what the scenes are drawn from.
        seed: seed of the data set.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        count: number of scenes.
        written: is told after every chunk how many scenes are written.

    Memory: one chunk of 256 scenes. On the disk 51 kB a scene, 69 kB with i.i.d. symbols.

    Raises:
        DataError: the directory holds something, or cannot be written; what was written of it is of
            no use without its manifest.
    """
    try:
        _claim(directory)
        arrays = _write_arrays(directory, physics, seed, split, count, written)
        manifest = {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "physics": asdict(physics),
            "seed": seed,
            "split": split,
            "count": count,
            "arrays": arrays,
        }
        draft = directory / f".{MANIFEST_NAME}.partial"
        draft.write_text(json.dumps(manifest, indent=2) + "\n", encoding="ascii")
        os.replace(draft, directory / MANIFEST_NAME)
    except OSError as error:
        raise DataError(
            f"could not write scenes to {directory} ({error.strerror or error}); delete it and choose "
            "a place with more room"
        ) from error


def open_scenes(
    directory: Path, physics: ScenePhysics, *, seed: int, split: Split, count: int
) -> Scenes:
    """Return the first ``count`` scenes of a directory; their tensors are files mapped into memory.

    Every file is read once, to compare its checksum.

    Args:
        directory: written by :func:`write_scenes`.
        physics: what the scenes must have been drawn from.
        seed: the seed they must have.
        split: the split they must be of.
        count: number of scenes.

    Raises:
        DataError: the directory is missing, torn or foreign, or its scenes are others or too few.
    """
    manifest = _manifest(directory)
    wanted = {"seed": seed, "split": split, **asdict(physics)}
    held = {"seed": manifest["seed"], "split": manifest["split"], **manifest["physics"]}
    for name in sorted(wanted.keys() | held.keys()):
        if wanted.get(name) != held.get(name):
            raise DataError(
                f"the scenes in {directory} were drawn with {name}={held.get(name)!r}, the run wants "
                f"{wanted.get(name)!r}; write them anew with the settings of the run"
            )
    if manifest["count"] < count:
        raise DataError(
            f"{directory} holds {manifest['count']} scenes, the run wants {count}; write more of "
            "them, or set scenes.train"
        )
    tensors = {name: _mapped(directory, name, manifest) for name in _NAMES}
    return Scenes(**tensors).select(slice(0, count))


def _claim(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise DataError(
            f"cannot write scenes to {directory}: it holds something already; choose a new directory"
        )


def _write_arrays(
    directory: Path,
    physics: ScenePhysics,
    seed: int,
    split: Split,
    count: int,
    written: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Write every tensor, chunk by chunk; return what the manifest says of each.

    By plain writes and not through a memory map: on a full disk that would kill the process.
    """
    files: dict[str, _ArrayFile] = {}
    try:
        for start in range(0, count, _CHUNK):
            numbers = range(start, min(start + _CHUNK, count))
            scenes = draw_scenes(physics, seed=seed, split=split, indices=numbers)
            for name in _NAMES:
                array = getattr(scenes, name).numpy()
                if name not in files:
                    files[name] = _ArrayFile(directory / f"{name}.npy", array, count)
                files[name].append(array)
            written(numbers.stop)
        return {name: file.finish() for name, file in files.items()}
    finally:
        for file in files.values():
            file.close()


class _ArrayFile:
    """One ``.npy`` file of known length, written from front to back."""

    def __init__(self, path: Path, like: np.ndarray[Any, Any], count: int) -> None:
        self._dtype = like.dtype.newbyteorder("<")
        self._shape = (count, *like.shape[1:])
        self._checksum = 0
        self._stream: BufferedWriter = path.open("wb")
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._stream, header)

    def append(self, array: np.ndarray[Any, Any]) -> None:
        """Write some rows."""
        content = np.ascontiguousarray(array, dtype=self._dtype).tobytes()
        self._checksum = zlib.crc32(content, self._checksum)
        self._stream.write(content)

    def finish(self) -> dict[str, Any]:
        """Wait until the disk has it all; return shape, dtype and checksum of the data."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return {"shape": self._shape, "dtype": self._dtype.str, "crc32": self._checksum}

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _manifest(directory: Path) -> Mapping[str, Any]:
    path = directory / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{directory} holds no scenes: it has no {MANIFEST_NAME}, or they were not finished; write "
            "them with `python -m reference_trainer scenes`"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"could not read {path}: {error}; write the scenes anew") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is of another program; choose a directory of scenes")
    if manifest.get("schema") != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema {manifest.get('schema')!r}, this version reads {SCHEMA_VERSION}; "
            "write the scenes anew"
        )
    names = ("physics", "seed", "split", "count", "arrays")
    if any(name not in manifest for name in names) or set(_NAMES) - manifest["arrays"].keys():
        raise DataError(f"{path} does not describe all tensors of a scene; write the scenes anew")
    return manifest


def _mapped(directory: Path, name: str, manifest: Mapping[str, Any]) -> Tensor:
    """Map one file, copy-on-write: torch takes no array that cannot be written to."""
    path, said = directory / f"{name}.npy", manifest["arrays"][name]
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"could not map {path}: {error}; write the scenes anew") from None
    found = (list(array.shape), array.dtype.str, _checksum(array))
    if found != (list(said["shape"]), said["dtype"], said["crc32"]):
        raise DataError(
            f"{path} is not what was written: shape, type or checksum differ from {MANIFEST_NAME}; "
            "write the scenes anew"
        )
    tensor: Tensor = torch.from_numpy(array)
    return tensor


def _checksum(array: np.ndarray[Any, Any]) -> int:
    """Checksum of the bytes of a mapped array, a block at a time."""
    checksum = 0
    content: Any = array.reshape(-1).view(np.uint8)
    for start in range(0, len(content), _BLOCK_BYTES):
        checksum = zlib.crc32(content[start : start + _BLOCK_BYTES], checksum)
    return checksum

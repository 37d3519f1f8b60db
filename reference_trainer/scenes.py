"""Draws scenes: a data set is a function of (seed, split, index) and not a pile of files."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from reference_trainer.estimate import estimate_field
from reference_trainer.synthesis import synthesise
from reference_trainer.variates import draw_variates

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from reference_trainer.physics import ScenePhysics

Split = Literal["train", "validation", "test"]
_SPLIT_STREAM: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
_BLOCK = 32  # scenes worked on together: their channels fit the cache of one core


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scenes:
    """A batch of B scenes: what was received, what the receiver knows, and the truth.

    Reals are float32, complex values complex64. L snapshots, M antennas, N RIS elements, K slots
    for sources. Slots are sorted by azimuth; inactive ones come last and hold zeros.

    Attributes:
        snapshots: received ``[B, L, M]``, ``y_l = H diag(c_l) x_l + noise``; the receiver's gain
            makes the clean part of unit mean power.
        codes: reflection coefficients ``[B, L, N]`` of the RIS, of unit modulus.
        channel: H, ``[B, M, N]``, from the RIS to the base station.
        snr_db: ``[B]``, power of the clean snapshots over that of the noise.
        num_sources: ``[B]`` int64, 1 to K.
        azimuth_rad: ``[B, K]``.
        elevation_rad: ``[B, K]``.
        range_m: ``[B, K]``.
        active: ``[B, K]`` bool, whether the slot holds a source.
        true_factor: A, ``[B, N, K]``, one column a source: its steering vector times the root of
            its power. The spatial covariance is ``A A^H``, of trace N.
        true_basis: ``[B, N, K]``, orthonormal basis of the steering vectors of the sources.
        estimate: ``[B, N, S]``, the receiver's estimate of the field on the RIS, of squared norm
            N; S is 1 for constant symbols, else L, and 0 when it was not asked for.
    """

    snapshots: Tensor
    codes: Tensor
    channel: Tensor
    snr_db: Tensor
    num_sources: Tensor
    azimuth_rad: Tensor
    elevation_rad: Tensor
    range_m: Tensor
    active: Tensor
    true_factor: Tensor
    true_basis: Tensor
    estimate: Tensor

    def __post_init__(self) -> None:
        lengths = {name: len(value) for name, value in self._tensors()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"scenes: tensors disagree on the number of scenes: {lengths}")

    def __len__(self) -> int:
        return len(self.snapshots)

    def to(self, device: torch.device | str) -> Scenes:
        """Return the scenes on another device. Sync: as ``Tensor.to``."""
        return Scenes(**{name: value.to(device) for name, value in self._tensors()})

    def select(self, index: Tensor | slice) -> Scenes:
        """Return some of the scenes: a slice shares memory, an index tensor ``[n]`` copies."""
        return Scenes(**{name: value[index] for name, value in self._tensors()})

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self))


def draw_scenes(
    physics: ScenePhysics,
    *,
    seed: int,
    split: Split,
    indices: Iterable[int],
    estimate: bool = True,
) -> Scenes:
    """Return the scenes of the given numbers, in the order given, on the CPU.

    Scene ``(seed, split, index)`` has a random stream of its own, whatever is drawn beside it: any
    chunking gives the same bits, and no scene of one split is a scene of another. While it works,
    torch has one thread (single scenes are too small for two), and its old number afterwards.

    Args:
        physics: what is installed and the ranges to draw from.
        seed: seed of the data set, 0 or more.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        indices: numbers of the scenes, from 0 to 2**32 - 1, at least one.
        estimate: False leaves ``Scenes.estimate`` with no columns, which is several times faster.

    Raises:
        ValueError: a seed, split or index that is out of range, or no index at all.
    """
    numbers = _checked(seed, split, indices)
    chunks = (numbers[start : start + _BLOCK] for start in range(0, len(numbers), _BLOCK))
    with _one_thread():
        blocks = [
            _draw_block(physics, seed, _SPLIT_STREAM[split], chunk, estimate) for chunk in chunks
        ]
        whole = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return Scenes(**whole)


def _checked(seed: int, split: str, indices: Iterable[int]) -> list[int]:
    numbers = [int(index) for index in indices]
    if seed < 0:
        raise ValueError(f"drawing scenes: the seed is {seed}; expected 0 or more")
    if split not in _SPLIT_STREAM:
        known = ", ".join(repr(name) for name in get_args(Split))
        raise ValueError(f"drawing scenes: the split is {split!r}; expected one of {known}")
    if not numbers:
        raise ValueError("drawing scenes: no indices were given; pass at least one")
    if min(numbers) < 0 or max(numbers) >= 2**32:
        raise ValueError(
            f"drawing scenes: the indices reach from {min(numbers)} to {max(numbers)}; "
            "expected 0 to 2**32 - 1"
        )
    return numbers


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _draw_block(
    physics: ScenePhysics, seed: int, stream: int, numbers: list[int], estimate: bool
) -> dict[str, Tensor]:
    variates = draw_variates(physics, [(seed, stream, number) for number in numbers])
    block = synthesise(physics, variates)
    field = np.empty((len(numbers), physics.elements, 0), np.complex64)
    if estimate:
        known = (block[name] for name in ("snapshots", "codes", "channel", "snr_db"))
        field = estimate_field(*known, coherent=physics.symbols == "constant")
    block["estimate"] = field
    return {name: torch.from_numpy(array) for name, array in block.items()}


def fingerprint(scenes: Scenes) -> list[str]:
    """Return one hash a scene, equal for two scenes just when their sources stand alike.

    Only the true positions enter: the same sources under other noise are still the same scene,
    and a data set that holds them twice has leaked. Sync: one copy to the host.
    """
    truth = torch.stack((scenes.azimuth_rad, scenes.elevation_rad, scenes.range_m), dim=1)
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in truth.cpu().numpy()]

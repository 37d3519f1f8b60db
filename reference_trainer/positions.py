"""Where sources are said to stand: what every estimator returns and every metric takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from reference_trainer.scenes import Scenes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Positions:
    """Sources of a batch of B scenes in K slots, in any order. Axes: see ``physics``.

    Attributes:
        azimuth_rad: real ``[B, K]``.
        elevation_rad: real ``[B, K]``.
        range_m: real ``[B, K]``, above 0 where active.
        active: bool ``[B, K]``, whether the slot holds a source; what inactive slots hold is undefined,
            but finite.
    """

    azimuth_rad: Tensor
    elevation_rad: Tensor
    range_m: Tensor
    active: Tensor

    def __post_init__(self) -> None:
        shapes = {name: tuple(value.shape) for name, value in self._tensors()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"positions: tensors disagree in shape: {shapes}")

    def __len__(self) -> int:
        return len(self.active)

    @property
    def num_sources(self) -> Tensor:
        """Number of sources, int64 ``[B]``."""
        return self.active.sum(-1)

    def to(self, device: torch.device | str) -> Positions:
        """Return the positions on another device. Sync: as ``Tensor.to``."""
        return Positions(**{name: value.to(device) for name, value in self._tensors()})

    def select(self, index: Tensor | slice) -> Positions:
        """Return some of the scenes: a slice shares memory, an index tensor ``[n]`` copies."""
        return Positions(**{name: value[index] for name, value in self._tensors()})

    def replaced(self, index: Tensor, other: Positions) -> Positions:
        """Return these with the scenes ``index`` (int64 ``[n]``) taken from ``other``, of n scenes."""
        return Positions(
            **{
                name: value.index_copy(0, index, getattr(other, name))
                for name, value in self._tensors()
            }
        )

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, getattr(self, name)) for name in self.__slots__)


def true_positions(scenes: Scenes) -> Positions:
    """Return where the sources of ``scenes`` really stand. Sync: none."""
    return Positions(
        azimuth_rad=scenes.azimuth_rad,
        elevation_rad=scenes.elevation_rad,
        range_m=scenes.range_m,
        active=scenes.active,
    )


def concatenated(parts: list[Positions]) -> Positions:
    """Return the scenes of several batches in order. Sync: none.

    Raises:
        ValueError: no batches.
    """
    if not parts:
        raise ValueError("concatenating positions: no batches were given; pass at least one")
    names = parts[0].__slots__
    return Positions(**{name: torch.cat([getattr(one, name) for one in parts]) for name in names})

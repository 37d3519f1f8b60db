"""Positions as rows of parameters, and scenes in chunks of equally many sources: what fits work on.

Axes: B scenes, K slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reference_trainer.positions import Positions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from reference_trainer.scenes import Scenes

_SMALLEST_RANGE_M = 1e-3
"""Inactive slots may hold a range of zero, whose inverse would not be finite."""


def alike(numbers: Tensor, chunk: int) -> Iterator[tuple[Tensor, int]]:
    """Yield scenes of equally many sources, at most ``chunk`` of them, and that number.

    Args:
        numbers: of sources, integers ``[B]``.
        chunk: most scenes yielded together.

    Sync: once for each number of sources.
    """
    for count in range(int(numbers.max()) + 1):
        scenes = (numbers == count).nonzero().squeeze(-1)
        yield from ((rows, count) for rows in torch.split(scenes, chunk) if len(rows))


def active_slots(active: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` active slots, in order, ``[B, count]``. Sync: none."""
    return active.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :count]


def to_parameters(positions: Positions) -> Tensor:
    """Return azimuth, elevation, 1 / range, float64 ``[B, K, 3]``, finite in inactive slots too."""
    inverse_range = positions.range_m.double().clamp_min(_SMALLEST_RANGE_M).reciprocal()
    angles = (positions.azimuth_rad.double(), positions.elevation_rad.double())
    return torch.stack((*angles, inverse_range), dim=-1)


def to_positions(parameters: Tensor, active: Tensor, scenes: Scenes) -> Positions:
    """Return the positions of parameters ``[B, K, 3]``, in the precision of ``scenes``."""
    azimuth, elevation, inverse_range = parameters.unbind(-1)
    dtype = scenes.azimuth_rad.dtype
    return Positions(
        azimuth_rad=azimuth.to(dtype),
        elevation_rad=elevation.to(dtype),
        range_m=inverse_range.reciprocal().to(dtype),
        active=active,
    )


def require_start(scenes: Scenes, start: Positions) -> None:
    """Refuse a start that a fit cannot begin with.

    Raises:
        ValueError: it has other scenes, or an active source that is not finite.

    Sync: once.
    """
    if len(start) != len(scenes):
        raise ValueError(
            f"refining positions: got positions of {len(start)} scenes for {len(scenes)} scenes"
        )
    finite = torch.isfinite(to_parameters(start)).all(dim=-1)
    wrong = int((start.active & ~finite).sum())
    if wrong:
        raise ValueError(
            f"refining positions: {wrong} active sources of the start are NaN or infinite; "
            "expected a number for every coordinate"
        )


def require_positive(**options: int) -> None:
    """Raise ValueError for an option below 1, by its name."""
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"fitting positions: {name} is {value}; expected at least 1")

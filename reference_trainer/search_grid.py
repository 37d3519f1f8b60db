"""A grid over all places where a source may stand, with its steering vectors: a dictionary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from reference_trainer.geometry import steering_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.physics import ScenePhysics

DEPTH_CELLS = 3.6
"""Width of a resolution cell in inverse range, in units of wavelength / aperture squared."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchGrid:
    """G places on an even grid of sine of azimuth, sine of elevation and inverse range.

    Even in these coordinates because neighbours then differ by about the same steering phase.

    Attributes:
        places: float32 ``[G, 3]``: azimuth in rad, elevation in rad, inverse range in 1/m.
        vectors: complex64 ``[N, G]``, the unit-norm steering vector of each place.
        steps: distances of neighbours: in sine of azimuth, sine of elevation, inverse range in 1/m.
        shape: points along the three axes; places are listed with inverse range fastest.
    """

    places: Tensor
    vectors: Tensor
    steps: tuple[float, float, float]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.places)

    def near(self, cells: Tensor, *, within: int) -> Tensor:
        """Return which places, bool ``[B, G]``, lie within some steps of a cell ``[B]`` each.

        Only the direction counts: all ranges of a near direction are near. Sync: none.
        """
        azimuths, elevations, ranges = self.shape
        row, column = cells // (elevations * ranges), cells // ranges % elevations
        across = (torch.arange(azimuths, device=cells.device) - row[:, None]).abs() <= within
        up = (torch.arange(elevations, device=cells.device) - column[:, None]).abs() <= within
        near = across[:, :, None, None] & up[:, None, :, None]
        return near.expand(-1, -1, -1, ranges).flatten(1)


@lru_cache(maxsize=8)
def search_grid(physics: ScenePhysics, *, oversampling: float, device: torch.device) -> SearchGrid:
    """Return the grid over the field of view and the ranges of ``physics``, edges included.

    The last few grids are remembered: building one costs more than searching it once.

    Args:
        physics: geometry, field of view and ranges.
        oversampling: points per resolution cell of the aperture along each axis.
        device: where the grid lies.

    Raises:
        ValueError: ``oversampling`` is not above 0.

    Memory: 8 N bytes a place; 7 MB for N = 144 and 3 points a cell.
    """
    if not oversampling > 0:
        raise ValueError(f"laying a search grid: oversampling is {oversampling}; expected above 0")
    aperture_m = physics.side_elements * physics.spacing_m
    cell = physics.wavelength_m / aperture_m
    cells = (cell, cell, DEPTH_CELLS * cell / aperture_m)
    axes = [
        _axis(low, high, width / oversampling)
        for (low, high), width in zip(_extents(physics), cells, strict=True)
    ]
    mesh = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3).to(device)
    places = places_from_sines(mesh)
    vectors = steering_vectors(physics, places[:, 0], places[:, 1], 1 / places[:, 2]).mT
    steps = [float(axis[1] - axis[0]) if len(axis) > 1 else 0.0 for axis in axes]
    return SearchGrid(
        places=places,
        vectors=vectors.contiguous(),
        steps=(steps[0], steps[1], steps[2]),
        shape=(len(axes[0]), len(axes[1]), len(axes[2])),
    )


def place_bounds(physics: ScenePhysics) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest place, float64 ``[3]`` each, in the units of the grid."""
    azimuth = math.radians(physics.azimuth_half_width_deg)
    elevation = math.radians(physics.elevation_half_width_deg)
    lowest = (-azimuth, -elevation, 1 / physics.max_range_m)
    highest = (azimuth, elevation, 1 / physics.min_range_m)
    return torch.tensor(lowest, dtype=torch.float64), torch.tensor(highest, dtype=torch.float64)


def places_from_sines(sines: Tensor) -> Tensor:
    """Return places ``[..., 3]`` from sine of azimuth, sine of elevation and inverse range."""
    return torch.cat((torch.asin(sines[..., :2]), sines[..., 2:]), dim=-1)


def _extents(physics: ScenePhysics) -> tuple[tuple[float, float], ...]:
    azimuth = math.sin(math.radians(physics.azimuth_half_width_deg))
    elevation = math.sin(math.radians(physics.elevation_half_width_deg))
    inverse_range = (1 / physics.max_range_m, 1 / physics.min_range_m)
    return (-azimuth, azimuth), (-elevation, elevation), inverse_range


def _axis(low: float, high: float, widest_step: float) -> Tensor:
    points = 1 + math.ceil((high - low) / widest_step - 1e-9)
    return torch.linspace(low, high, points)

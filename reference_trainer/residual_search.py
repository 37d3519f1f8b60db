"""Where the next source may be: the residual of every point of a grid, without a loop over points.

Axes: B scenes, S blocks, R equations of a block, N RIS elements, G grid points, K sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reference_trainer.geometry import steering_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.sensing import SensingBlocks

_SMALLEST_SHARE = 1e-3
"""Of the energy of a column: what is left outside the span of the sources is rounding below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GridShape:
    """Points of the grid along each axis; equally spaced in sin azimuth, sin elevation, 1 / range.

    Raises:
        ValueError: an axis without points.
    """

    azimuths: int
    elevations: int
    ranges: int

    def __post_init__(self) -> None:
        if min(self.azimuths, self.elevations, self.ranges) < 1:
            raise ValueError(f"search grid: got {self}; expected at least one point on each axis")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """Points where a source may be.

    Attributes:
        points: azimuth, elevation and 1 / range, float64 ``[G, 3]``.
        vectors: steering vectors, complex64 ``[N, G]``.
    """

    points: Tensor
    vectors: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GridResponse:
    """What each scene would receive of a source at each grid point.

    Attributes:
        columns: complex ``[B, S, R, G]``.
        energy: their squared norms, real ``[B, S, G]``.
    """

    columns: Tensor
    energy: Tensor

    def select(self, index: Tensor) -> GridResponse:
        """Return some of the scenes, copied."""
        return GridResponse(columns=self.columns[index], energy=self.energy[index])


def make_grid(physics: ScenePhysics, shape: GridShape, *, device: torch.device) -> Grid:
    """Return the grid over the field of view and the ranges of ``physics``."""

    def axis(low: float, high: float, count: int) -> Tensor:
        edges = torch.linspace(low, high, 2 * count + 1, dtype=torch.float64)
        return edges[1::2]

    across = math.sin(math.radians(physics.azimuth_half_width_deg))
    along = math.sin(math.radians(physics.elevation_half_width_deg))
    points = torch.cartesian_prod(
        axis(-across, across, shape.azimuths).asin(),
        axis(-along, along, shape.elevations).asin(),
        axis(1 / physics.max_range_m, 1 / physics.min_range_m, shape.ranges),
    ).to(device)
    vectors = steering_vectors(physics, points[:, 0], points[:, 1], points[:, 2].reciprocal())
    return Grid(points=points, vectors=vectors.to(torch.complex64).mT.contiguous())


def grid_response(blocks: SensingBlocks, grid: Grid) -> GridResponse:
    """Return what every grid point would send, one large product. Memory: 8 S R G bytes a scene."""
    columns = blocks.matrix @ grid.vectors.to(blocks.matrix.dtype)
    parts = torch.view_as_real(columns)
    return GridResponse(columns=columns, energy=parts.square().sum(-1).sum(-2))


def gains(response: GridResponse, target: Tensor, columns: Tensor | None) -> Tensor:
    """Return by how much a further source at each grid point lowers the residual, ``[B, G]``.

    Exact for the point, with the symbols of all sources solved anew: the share of the point's
    column outside the span of the sources counts, not the column itself.

    Args:
        response: the columns of the grid points.
        target: what was received, ``[B, S, R]``.
        columns: received steering vectors of the sources already there, ``[B, S, K, R]``, or None.
    """
    probes = target.to(response.columns.dtype).unsqueeze(-2)
    left = response.energy
    if columns is not None:
        basis = torch.linalg.qr(columns.mT.to(torch.complex128)).Q
        rest = target.unsqueeze(-1) - basis @ (basis.mH @ target.unsqueeze(-1))
        probes = torch.cat((rest, basis), dim=-1).mT.to(response.columns.dtype)
    seen = torch.view_as_real(probes.conj() @ response.columns).square().sum(-1)
    left = (left - seen[..., 1:, :].sum(-2)).maximum(_SMALLEST_SHARE * response.energy)
    return (seen[..., 0, :] / left).sum(1)

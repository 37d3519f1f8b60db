"""Where the elements are, and how the RIS answers a spherical wave. See ``physics`` for the axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.physics import ScenePhysics

STENCIL_OFFSETS_RAD = (-0.1, -0.05, 0.0, 0.05, 0.1)
"""Offsets, in azimuth and in elevation, of the directions around a source in its stencil."""

STENCIL_CENTRE = len(STENCIL_OFFSETS_RAD) ** 2 // 2
"""Index of the true direction among the directions of a stencil."""


def element_positions_m(
    physics: ScenePhysics, *, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the coordinates ``(x, y)`` of the RIS elements in metres, two real tensors ``[N]``.

    Args:
        physics: gives the number of elements and their spacing.
        like: dtype and device of the result are those of this tensor (default float32, CPU).
    """
    side = physics.side_elements
    dtype = torch.float32 if like is None else like.dtype
    device = None if like is None else like.device
    axis = (torch.arange(side, dtype=dtype, device=device) - (side - 1) / 2) * physics.spacing_m
    return axis.repeat(side), axis.repeat_interleave(side)


def steering_vectors(
    physics: ScenePhysics,
    azimuth_rad: Tensor,
    elevation_rad: Tensor,
    range_m: Tensor,
    *,
    offsets_m: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""Return the unit-norm response ``[..., N]`` of the RIS to point sources, complex.

    ``a_n = N^(-1/2) exp(-j k (rho_n - r))``, with ``rho_n`` the exact distance from the source to
    element n, ``k = 2 pi / wavelength`` and the phase referred to the centre of the RIS. A longer
    path is a more negative phase.

    Args:
        physics: geometry and wavelength.
        azimuth_rad: real ``[...]``; float32 and float64 are computed as such.
        elevation_rad: real ``[...]``, broadcast against the azimuth.
        range_m: real ``[...]``, above 0, broadcast against the azimuth.
        offsets_m: displacements of the elements along x and y, each ``[..., N]``, broadcast against
            the result; None for elements that are where they should be.

    Sync: none. Differentiable in all three.
    """
    x_m, y_m = element_positions_m(physics, like=azimuth_rad)
    if offsets_m is not None:
        x_m, y_m = x_m + offsets_m[0], y_m + offsets_m[1]
    azimuth, elevation, radius_m = (t.unsqueeze(-1) for t in (azimuth_rad, elevation_rad, range_m))
    towards, upwards = phasors(azimuth), phasors(elevation)
    along_x = towards.imag * upwards.real
    aperture = x_m * x_m + y_m * y_m
    # rho^2 - r^2; dividing by rho + r gives rho - r without the cancellation of two long paths.
    excess = aperture - 2 * radius_m * (along_x * x_m + upwards.imag * y_m)
    distance_m = (radius_m * radius_m + excess).sqrt()
    wavenumber = 2 * math.pi / physics.wavelength_m
    phase_rad = -wavenumber * (excess / (distance_m + radius_m))
    return phasors(phase_rad, modulus=physics.elements**-0.5)


def phasors(phase_rad: Tensor, *, modulus: float = 1.0) -> Tensor:
    """Return ``modulus * exp(j phase)``, complex, of the shape given.

    ``torch.polar`` works one number at a time on the CPU. The vectorised sine may round the rest
    of an array differently from its bulk, and a scene would depend on the size of its batch.
    """
    return torch.polar(torch.full_like(phase_rad, modulus), phase_rad)


def stencil_vectors(
    physics: ScenePhysics,
    azimuth_rad: Tensor,
    elevation_rad: Tensor,
    range_m: Tensor,
    *,
    active: Tensor,
) -> Tensor:
    """Return steering vectors at 25 directions around each source, complex ``[..., 25, N]``.

    The directions are all pairs of :data:`STENCIL_OFFSETS_RAD` (azimuth slow, elevation fast) at
    the range of the source; number :data:`STENCIL_CENTRE` is the source itself.

    Args:
        physics: geometry and wavelength.
        azimuth_rad: real ``[...]``.
        elevation_rad: real ``[...]``.
        range_m: real ``[...]``; padding of inactive slots may be 0.
        active: bool ``[...]``; an inactive slot has a stencil too, at 1 m: mask what you read.

    Sync: none. Memory: 29 kB a slot in float32 for N = 144.
    """
    offsets = torch.tensor(STENCIL_OFFSETS_RAD, dtype=azimuth_rad.dtype, device=azimuth_rad.device)
    azimuth = azimuth_rad.unsqueeze(-1) + offsets.repeat_interleave(len(offsets))
    elevation = elevation_rad.unsqueeze(-1) + offsets.repeat(len(offsets))
    radius_m = torch.where(active, range_m, torch.ones_like(range_m)).unsqueeze(-1)
    return steering_vectors(physics, azimuth, elevation, radius_m)

"""Descends the MUSIC null spectrum from grid places to its minima, many peaks at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reference_trainer.geometry import element_positions_m, phasors
from reference_trainer.search_grid import place_bounds

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.physics import ScenePhysics

_FIRST_DAMPING = 1e-3
_DAMPING_AFTER_SUCCESS, _DAMPING_AFTER_FAILURE = 0.2, 8.0
_SMALLEST_REMAINDER = 1e-9


@dataclass(frozen=True, slots=True)
class _Quadratic:
    """A function at P places: value ``[P]``, gradient ``[P, 3]``, Gauss-Newton Hessian."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor

    def where(self, better: Tensor, other: _Quadratic) -> _Quadratic:
        """Return this model where ``better`` ``[P]``, and the other one elsewhere."""
        return _Quadratic(
            torch.where(better, self.value, other.value),
            torch.where(better[:, None], self.gradient, other.gradient),
            torch.where(better[:, None, None], self.hessian, other.hessian),
        )


def descend(
    physics: ScenePhysics, places: Tensor, *, signal: Tensor, found: Tensor, iterations: int = 10
) -> tuple[Tensor, Tensor]:
    """Return nearby minima of the null spectrum, float64 ``[P, 3]``, and its values there, ``[P]``.

    By Levenberg-Marquardt, a few steps in all three coordinates together.

    The null spectrum is ``(1 - |U^H a|^2 - |Q^H a|^2) / (1 - |Q^H a|^2)``: the share of a steering
    vector outside the signal subspace, after what was found is projected out of both. A step is
    taken only where it lowers the spectrum, and never leaves the field of view.

    Args:
        physics: geometry, field of view and ranges.
        places: ``[P, 3]``: azimuth in rad, elevation in rad, inverse range in 1/m.
        signal: U, complex128 ``[P, N, K]``, orthonormal or zero columns, orthogonal to Q.
        found: Q, complex128 ``[P, N, k]``, orthonormal columns; k may be 0.
        iterations: number of steps tried.

    Sync: none.
    """
    lowest, highest = (bound.to(places.device) for bound in place_bounds(physics))
    here = places.to(torch.float64)
    damping = torch.full_like(here[:, 0], _FIRST_DAMPING)
    # Conjugated and joined once, not in every step.
    rows = torch.cat((found, signal), dim=-1).mH.resolve_conj().contiguous()
    local = _null_spectrum(physics, here, rows, found.shape[-1])
    for _ in range(iterations):
        diagonal = local.hessian.diagonal(dim1=1, dim2=2)
        loaded = local.hessian + torch.diag_embed(damping[:, None] * diagonal)
        step = torch.linalg.solve_ex(loaded, local.gradient)[0]
        there = torch.clamp(here - step, lowest, highest)
        tried = _null_spectrum(physics, there, rows, found.shape[-1])
        better = tried.value < local.value  # False for NaN: a failed solve moves nothing
        here = torch.where(better[:, None], there, here)
        local = tried.where(better, local)
        damping = damping * torch.where(better, _DAMPING_AFTER_SUCCESS, _DAMPING_AFTER_FAILURE)
    return here, local.value


def steering_with_slopes(physics: ScenePhysics, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return steering vectors ``[P, N]`` and their derivatives ``[P, N, 3]`` by the place.

    Args:
        physics: geometry and wavelength.
        places: real ``[P, 3]``: azimuth in rad, elevation in rad, inverse range in 1/m.

    Sync: none.
    """
    x_m, y_m = element_positions_m(physics, like=places)
    azimuth, elevation, inverse_range = places.unsqueeze(-1).unbind(dim=1)
    radius_m = 1 / inverse_range
    towards, upwards = phasors(azimuth), phasors(elevation)
    along_m = towards.imag * upwards.real * x_m + upwards.imag * y_m
    excess = x_m * x_m + y_m * y_m - 2 * radius_m * along_m
    distance_m = (radius_m * radius_m + excess).sqrt()
    by_azimuth = -radius_m * towards.real * upwards.real * x_m / distance_m
    turned_m = upwards.real * y_m - towards.imag * upwards.imag * x_m
    by_elevation = -radius_m * turned_m / distance_m
    by_inverse_range = radius_m * radius_m * (1 - (radius_m - along_m) / distance_m)
    slopes_m = torch.stack((by_azimuth, by_elevation, by_inverse_range), dim=-1)
    wavenumber = 2 * math.pi / physics.wavelength_m
    delay_m = excess / (distance_m + radius_m)
    vectors = phasors(-wavenumber * delay_m, modulus=physics.elements**-0.5)
    return vectors, (-1j * wavenumber) * vectors.unsqueeze(-1) * slopes_m


def _null_spectrum(physics: ScenePhysics, places: Tensor, rows: Tensor, found: int) -> _Quadratic:
    """The null spectrum at ``places``; ``rows`` ``[P, k + K, N]`` are Q^H (k = ``found``) and U^H."""
    vectors, slopes = steering_with_slopes(physics, places)
    inside = rows @ torch.cat((vectors.unsqueeze(-1), slopes), dim=-1)
    whole = (slopes.mH @ slopes).real
    outside = _outside(inside, whole)
    if not found:
        return outside
    left = _outside(inside[:, :found], whole)
    remainder = left.value.clamp_min(_SMALLEST_REMAINDER)
    ratio = outside.value / remainder
    gradient = (outside.gradient - ratio[:, None] * left.gradient) / remainder[:, None]
    return _Quadratic(ratio, gradient, outside.hessian / remainder[:, None, None])


def _outside(inside: Tensor, whole: Tensor) -> _Quadratic:
    """How much of the squared norm of a steering vector lies outside an orthonormal basis.

    ``inside`` ``[P, columns, 4]`` are the coefficients of the vector and its slopes, ``whole``
    ``[P, 3, 3]`` is the Gram matrix of the slopes.
    """
    part, slopes = inside[..., :1], inside[..., 1:]
    value = 1 - torch.view_as_real(part).square().sum(dim=(1, 2, 3))
    gradient = -2 * (slopes.mH @ part).real.squeeze(-1)
    hessian = 2 * (whole - (slopes.mH @ slopes).real)
    return _Quadratic(value, gradient, hessian)

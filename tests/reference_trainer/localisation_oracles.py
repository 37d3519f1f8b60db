"""Slow and plain versions of what the localisation does in batches, one scene and place at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from reference_trainer.physics import ScenePhysics

Array = NDArray[np.complex128]
Place = tuple[float, float, float]


def steering(physics: ScenePhysics, azimuth: float, elevation: float, range_m: float) -> Array:
    """Response of the RIS to one source, from the distances between points in space."""
    side, centre = physics.side_elements, (physics.side_elements - 1) / 2
    across, up = np.meshgrid(np.arange(side) - centre, np.arange(side) - centre)
    source = range_m * np.array(
        [
            math.sin(azimuth) * math.cos(elevation),
            math.sin(elevation),
            math.cos(azimuth) * math.cos(elevation),
        ]
    )
    planar = (physics.spacing_m * across - source[0]) ** 2 + (
        physics.spacing_m * up - source[1]
    ) ** 2
    distance = np.sqrt(planar + source[2] ** 2).ravel()
    return np.exp(-2j * math.pi / physics.wavelength_m * (distance - range_m)) / side


def noise_subspace(covariance: Array, num_sources: int) -> Array:
    """Eigenvectors of all eigenvalues but the ``num_sources`` largest."""
    return np.linalg.eigh(covariance)[1][:, : len(covariance) - num_sources]


def null(physics: ScenePhysics, noise: Array, place: Place) -> float:
    """Squared norm of the part of a steering vector that lies in the noise subspace."""
    return float(np.sum(np.abs(noise.conj().T @ steering(physics, *place)) ** 2))


def golden_section(function: Callable[[float], float], low: float, high: float) -> float:
    """Place of the smallest value of a function with one minimum between ``low`` and ``high``."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    for _ in range(30):
        if function(left) < function(right):
            high, right = right, left
            left = high - ratio * (high - low)
        else:
            low, left = left, right
            right = low + ratio * (high - low)
    return (low + high) / 2


def music_point_by_point(
    physics: ScenePhysics,
    covariance: Array,
    num_sources: int,
    places: list[Place],
    vectors: list[Array],
) -> list[Place]:
    """MUSIC as textbooks write it: a loop over the grid, suppressed neighbours, a line search.

    ``vectors`` are the steering vectors of ``places``.
    """
    conjugate = np.ascontiguousarray(noise_subspace(covariance, num_sources).conj().T)
    depth = np.array([np.linalg.norm(conjugate @ vector) ** 2 for vector in vectors])
    found: list[Place] = []
    for _ in range(num_sources):
        best = int(depth.argmin())
        for index, vector in enumerate(vectors):
            if abs(np.vdot(vectors[best], vector)) > 0.45:
                depth[index] = 2.0
        found.append(_refined(physics, conjugate.conj().T, places[best]))
    return found


def _refined(physics: ScenePhysics, noise: Array, place: Place) -> Place:
    azimuth, elevation, inverse = place[0], place[1], 1 / place[2]
    for width in (0.05, 0.01):
        azimuth = golden_section(
            lambda x, y=elevation, z=inverse: null(physics, noise, (x, y, 1 / z)),
            azimuth - width,
            azimuth + width,
        )
        elevation = golden_section(
            lambda y, x=azimuth, z=inverse: null(physics, noise, (x, y, 1 / z)),
            elevation - width,
            elevation + width,
        )
        inverse = golden_section(
            lambda z, x=azimuth, y=elevation: null(physics, noise, (x, y, 1 / z)),
            max(inverse - 2 * width, 0.05),
            inverse + 2 * width,
        )
    return azimuth, elevation, 1 / inverse


def fixed_point_powers(
    sensing: Array, received: Array, atoms: Array, power: NDArray[np.float64], noise: float
) -> Iterator[NDArray[np.float64]]:
    """Yield the powers after each round of the dictionary fit, with dense inverses in loops.

    Sensing ``[l, m, N]``, received ``[l, m]``, atoms ``[N, A]``, power ``[A]``.
    """
    while True:
        measured, expected = np.zeros(len(power)), np.zeros(len(power))
        for matrix, snapshot in zip(sensing, received, strict=True):
            seen = matrix @ atoms
            covariance = (seen * power) @ seen.conj().T + noise * np.eye(len(snapshot))
            inverse = np.linalg.inv(covariance)
            for index in range(len(power)):
                column = seen[:, index]
                measured[index] += abs(column.conj() @ inverse @ snapshot) ** 2
                expected[index] += float((column.conj() @ inverse @ column).real)
        power = power * measured / expected
        yield power

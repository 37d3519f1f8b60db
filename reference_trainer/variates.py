"""The random numbers of a scene: one stream each, drawn in one fixed order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from reference_trainer.channel import ComplexArray
    from reference_trainer.physics import ScenePhysics

SCENE_UNIFORMS = 7  # number of sources, SNR, Rician factor, two angles at either end of the link
SOURCE_UNIFORMS = 3  # azimuth, elevation, range


@dataclass(frozen=True, slots=True)
class Variates:
    """All random numbers of B scenes, in the order in which each stream yields them.

    Attributes:
        scene: float64 ``[B, 7]``, uniform on [0, 1).
        source: float64 ``[B, 3, K]``, uniform on [0, 1).
        levels: uint8 ``[B, L, N]``, quantised phases of the codes, below ``2 ** code_bits``; in a
            scene that drops bits they are multiples of a power of 2.
        scatter: complex64 ``[B, M, N]``, CN(0, 1).
        noise: complex64 ``[B, L, M]``, CN(0, 1).
        symbols: complex64 ``[B, L, K]``, CN(0, 1); constant symbols use the first snapshot's.
        jitter: float32 ``[B, 2, N]``, uniform on [-1, 1), or None where elements are not displaced.
    """

    scene: NDArray[np.float64]
    source: NDArray[np.float64]
    levels: NDArray[np.uint8]
    scatter: ComplexArray
    noise: ComplexArray
    symbols: ComplexArray
    jitter: NDArray[np.float32] | None = None


def draw_variates(physics: ScenePhysics, streams: Sequence[tuple[int, int, int]]) -> Variates:
    """Return the random numbers of the scenes ``(seed, split, index)``, one stream each.

    The streams are spawned, not seeded by sums: seed + 1 never continues where another scene is.
    """
    batch, slots = len(streams), physics.max_sources
    scatter = (batch, physics.antennas, physics.elements)
    noise = (batch, physics.snapshots, physics.antennas)
    symbols = (batch, physics.snapshots, slots)
    sizes = [math.prod(shape[1:]) for shape in (scatter, noise, symbols)]
    uniforms = np.empty((batch, SCENE_UNIFORMS + SOURCE_UNIFORMS * slots))
    levels = np.empty((batch, physics.snapshots, physics.elements), np.uint8)
    normals = np.empty((batch, 2 * sum(sizes)), np.float32)
    changes = np.empty((batch, _changes(physics)))
    for row, stream in enumerate(streams):
        generator = _generator(*stream)
        generator.random(out=uniforms[row])
        levels[row].flat = np.frombuffer(generator.bytes(levels[row].size), np.uint8)
        generator.standard_normal(out=normals[row], dtype=np.float32)
        if changes.size:  # last, so that the rest of the scene is the same with and without
            generator.random(out=changes[row])
    levels &= np.uint8(2**physics.code_bits - 1)
    if physics.code_bits_drop:
        levels &= _kept_bits(physics, changes[:, 0])[:, None, None]
    normals *= np.float32(math.sqrt(0.5))
    parts = np.split(normals.view(np.complex64), np.cumsum(sizes)[:-1], axis=1)
    return Variates(
        scene=uniforms[:, :SCENE_UNIFORMS],
        source=uniforms[:, SCENE_UNIFORMS:].reshape(batch, SOURCE_UNIFORMS, slots),
        levels=levels,
        scatter=parts[0].reshape(scatter),
        noise=parts[1].reshape(noise),
        symbols=parts[2].reshape(symbols),
        jitter=_jitter(physics, changes[:, 1:]) if physics.element_jitter else None,
    )


def _changes(physics: ScenePhysics) -> int:
    """Uniforms of a scene that varies its codes or its elements: bits to drop, two an element."""
    wanted = physics.element_jitter or physics.code_bits_drop
    return 1 + 2 * physics.elements if wanted else 0


def _kept_bits(physics: ScenePhysics, unit: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Masks ``[B]`` that clear the lowest 0 to ``code_bits_drop`` bits of a level."""
    dropped = np.floor(unit * (physics.code_bits_drop + 1)).astype(np.int64)
    masks: NDArray[np.uint8] = (256 - 2**dropped).astype(np.uint8)
    return masks


def _jitter(physics: ScenePhysics, unit: NDArray[np.float64]) -> NDArray[np.float32]:
    symmetric = (2 * unit - 1).astype(np.float32)
    return symmetric.reshape(len(unit), 2, physics.elements)


def _generator(seed: int, split: int, index: int) -> np.random.Generator:
    sequence = np.random.SeedSequence(seed, spawn_key=(split, index))
    return np.random.Generator(np.random.PCG64(sequence))

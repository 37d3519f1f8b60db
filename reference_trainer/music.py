"""Near-field MUSIC: finds azimuth, elevation and range of every source in a covariance.

A grid search and a descent for each source in turn. Before the next is sought, the sources found
are projected out of both the signal subspace and all steering vectors, so that a side lobe, or
another cell of the same peak, is never taken for a source, and two sources in one beam are told
apart. The subspace gives up a dimension for each: what a slightly misplaced source leaves behind
is dropped. With fewer directions than sources (coherent sources: one) the same steps are a
matching pursuit.

Source: recursively applied and projected MUSIC (Mosher and Leahy, 1999) and its truncated form
(Makela, Stenroos, Sarvas and Ilmoniemi, 2018).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reference_trainer.geometry import steering_vectors
from reference_trainer.null_descent import descend, steering_with_slopes
from reference_trainer.positions import Positions
from reference_trainer.search_grid import search_grid
from reference_trainer.subspace import deflation_weights, extended, signal_basis

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.search_grid import SearchGrid

OVERSAMPLING = 3.0
"""Points of the search grid per resolution cell along each axis."""

NEAR_CELLS = 2
"""A second descent starts more than this many cells from the best one in azimuth or elevation."""

_SMALLEST_REMAINDER = 0.2
"""Less than this of a steering vector outside the sources found counts as this much.

Right beside a source that was found every ratio of remainders is large; a real source is so as well
at some distance, and is started from there.
"""


@torch.no_grad()
def music(
    physics: ScenePhysics, factor: Tensor, num_sources: Tensor, *, chunk_scenes: int = 64
) -> Positions:
    """Return where ``num_sources`` sources stand, by MUSIC on the covariances F F^H.

    Args:
        physics: geometry, field of view and ranges; no source is sought outside.
        factor: F, complex ``[B, N, n]`` of any scale; ``covariance.factor_of`` makes one of a
            dense covariance.
        num_sources: int64 ``[B]``, from 0 to ``physics.max_sources``.
        chunk_scenes: scenes worked on together.

    Returns:
        float32 positions in ``physics.max_sources`` slots, in the order they were found (about
        strongest first).

    Raises:
        ValueError: a number of sources is out of range, or the factor has a wrong shape or values.

    Sync: waits for the device several times a chunk. Memory: 0.6 MB a scene of a chunk.
    """
    _require_counts(physics, num_sources)
    if factor.ndim != 3 or factor.shape[:2] != (len(num_sources), physics.elements):
        raise ValueError(
            f"MUSIC got factors of shape {tuple(factor.shape)} and {len(num_sources)} numbers of "
            f"sources; expected [B, {physics.elements}, n] and [B]"
        )
    grid = search_grid(physics, oversampling=OVERSAMPLING, device=factor.device)
    places = grid.places.new_zeros(len(factor), physics.max_sources, 3)
    places[..., 2] = 1.0
    # Scenes with equally many sources share a chunk: none waits for more sources than it has.
    counts = num_sources.to(factor.device)
    order = counts.argsort(descending=True, stable=True)
    for start in range(0, len(order), chunk_scenes):
        chunk = order[start : start + chunk_scenes]
        located = _located(physics, grid, factor[chunk], counts[chunk])
        places[chunk, : located.shape[1]] = located.to(places.dtype)
    slot = torch.arange(physics.max_sources, device=factor.device)
    return Positions(
        azimuth_rad=places[..., 0],
        elevation_rad=places[..., 1],
        range_m=1 / places[..., 2],
        active=slot < counts[:, None],
    )


@torch.no_grad()
def pseudo_spectrum(
    physics: ScenePhysics,
    factor: Tensor,
    num_sources: Tensor,
    *,
    azimuth_rad: Tensor,
    elevation_rad: Tensor,
    range_m: Tensor,
) -> Tensor:
    """Return the MUSIC pseudo-spectrum ``1 / (1 - |U^H a|^2)``, float32 ``[B, G]``, to be shown.

    Args:
        physics: geometry and wavelength.
        factor: complex ``[B, N, n]``.
        num_sources: int64 ``[B]``.
        azimuth_rad: real ``[G]``.
        elevation_rad: real ``[G]``.
        range_m: real ``[G]``.

    Sync: as :func:`music`.
    """
    vectors = steering_vectors(physics, azimuth_rad, elevation_rad, range_m).to(torch.complex64)
    width = max(1, int(num_sources.max()))
    basis = signal_basis(factor, num_sources, width=width).to(torch.complex64)
    return 1 / (1 - _squared_columns(basis.mH @ vectors.mT)).clamp_min(1e-6)


def _require_counts(physics: ScenePhysics, num_sources: Tensor) -> None:
    if num_sources.ndim != 1 or num_sources.is_floating_point():
        raise ValueError(
            f"MUSIC got numbers of sources of shape {tuple(num_sources.shape)} and "
            f"{num_sources.dtype}; expected integers [B]"
        )
    if len(num_sources) and not 0 <= int(num_sources.min()) <= int(num_sources.max()):
        raise ValueError(f"MUSIC got {int(num_sources.min())} sources; expected 0 or more")
    if len(num_sources) and int(num_sources.max()) > physics.max_sources:
        raise ValueError(
            f"MUSIC got {int(num_sources.max())} sources; expected at most {physics.max_sources}"
        )


def _located(physics: ScenePhysics, grid: SearchGrid, factor: Tensor, counts: Tensor) -> Tensor:
    """Places ``[B, most sources, 3]`` of one chunk, whose counts never rise."""
    most = int(counts[0])
    basis = signal_basis(factor, counts, width=most)
    rank = basis.abs().amax(dim=1).gt(0).sum(dim=1)
    # Coefficients of all steering vectors: rows of the basis first, then one for each source found.
    on_grid = grid.vectors.new_empty(len(factor), max(2 * most - 1, 0), len(grid))
    on_grid[:, :most] = _on_grid(basis, grid)
    found = basis[..., :0]
    places = grid.places.new_ones(len(factor), most, 3, dtype=torch.float64)
    for number in range(most):
        alive = int((counts > number).sum())  # a prefix, because the counts never rise
        basis, found, on_grid = basis[:alive], found[:alive], on_grid[:alive]
        left = torch.minimum(rank[:alive], counts[:alive] - number)
        weights = deflation_weights(basis, found, left)[..., : most - number]
        starts = _starts(on_grid[:, : most + number], weights, grid, most)
        signal = torch.cat((basis, found), dim=-1) @ weights
        here = _deepest(physics, starts, signal, found)
        places[:alive, number] = here
        if number + 1 < most:
            found = extended(found, steering_with_slopes(physics, here)[0])
            on_grid[:, most + number] = _on_grid(found[..., -1:], grid).squeeze(1)
    return places


def _on_grid(basis: Tensor, grid: SearchGrid) -> Tensor:
    """Coefficients ``[B, K, G]`` of all steering vectors of the grid: one matrix product."""
    rows = basis.mH.to(grid.vectors.dtype)
    product = rows.reshape(-1, rows.shape[-1]) @ grid.vectors
    return product.reshape(*rows.shape[:2], len(grid))


def _starts(on_grid: Tensor, weights: Tensor, grid: SearchGrid, width: int) -> list[Tensor]:
    """Places ``[B, 3]`` whose steering vectors lie most in what is left: the best, and one elsewhere.

    Rows of ``on_grid`` after the first ``width`` belong to the sources found.
    """
    inside = _squared_columns(weights.mH.to(on_grid.dtype) @ on_grid)
    remainder = 1 - _squared_columns(on_grid[:, width:])
    score = inside / remainder.clamp_min(_SMALLEST_REMAINDER)
    best = score.argmax(dim=1)
    elsewhere = score.masked_fill_(grid.near(best, within=NEAR_CELLS), -1.0).argmax(dim=1)
    return [grid.places[best], grid.places[elsewhere]]


def _deepest(physics: ScenePhysics, starts: list[Tensor], signal: Tensor, found: Tensor) -> Tensor:
    """The deepest of the minima ``[B, 3]`` that the descents from all starts end in."""
    count = len(starts)
    places, values = descend(
        physics,
        torch.cat(starts),
        signal=signal.repeat(count, 1, 1),
        found=found.repeat(count, 1, 1),
    )
    best = values.reshape(count, -1).argmin(dim=0)
    rows = torch.arange(len(best), device=best.device)
    return places.reshape(count, -1, 3)[best, rows]


def _squared_columns(matrix: Tensor) -> Tensor:
    """Squared norm ``[B, G]`` of every column of complex matrices ``[B, K, G]``."""
    # Not one sum over both axes: the CPU vectorises along the last axis only if that one stays.
    squares = torch.view_as_real(matrix).square().sum(dim=1)
    return squares[..., 0] + squares[..., 1]

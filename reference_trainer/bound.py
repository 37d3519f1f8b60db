"""The deterministic Cramer-Rao bound: the smallest error that any unbiased estimator can have.

The symbols are unknown constants (nuisance parameters), one for each source and block, and the
noise power is known. In every block, with ``A`` the received steering vectors, ``D`` their
derivatives and ``s`` the symbols, the Fisher information of the positions is
``J = 2 / sigma^2 Re{ diag(s)^H D^H (I - A A^+) D diag(s) }``, summed over the blocks; the bound is
the diagonal of its inverse. It says nothing about estimators that use prior knowledge: where the
bound is wider than the region in which sources can be, a guess does better.

Axes: B scenes, S blocks (1 or one a snapshot), R equations of a block, N RIS elements, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch

from reference_trainer.projection import information
from reference_trainer.scenes import Split
from reference_trainer.sensing import sensed, sensing_blocks, steering_derivatives
from reference_trainer.synthesis import place_sources
from reference_trainer.variates import draw_variates

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.scenes import Scenes
    from reference_trainer.sensing import SensingBlocks

_CHUNK = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bound:
    """Smallest possible standard deviations, float64, NaN in inactive slots.

    Infinite where the snapshots do not determine the position at all.

    Attributes:
        azimuth_rad: ``[B, K]``.
        elevation_rad: ``[B, K]``.
        range_m: ``[B, K]``.
    """

    azimuth_rad: Tensor
    elevation_rad: Tensor
    range_m: Tensor


def cramer_rao_bound(physics: ScenePhysics, scenes: Scenes, symbols: Tensor) -> Bound:
    """Return the bound of every source of ``scenes`` at its true position.

    Args:
        physics: geometry and symbol model.
        scenes: channel, codes, signal-to-noise ratio and true positions are used.
        symbols: complex ``[B, S, K]``, as :func:`sent_symbols` gives them: with the receiver's
            gain and the loss of the path, so that the clean snapshots have unit mean power.

    Raises:
        ValueError: ``symbols`` is of another shape.

    Sync: none on the CPU; on CUDA as ``torch.linalg.inv_ex``.
    """
    draws = physics.symbol_draws
    expected = (len(scenes), draws, scenes.active.shape[1])
    if tuple(symbols.shape) != expected:
        raise ValueError(
            f"bounding errors under {physics.symbols} symbols: got symbols of shape "
            f"{tuple(symbols.shape)}, expected {expected}: scenes, symbol draws, slots"
        )
    parts = [
        _deviations(physics, scenes.select(rows), symbols[rows])
        for rows in (slice(first, first + _CHUNK) for first in range(0, len(scenes), _CHUNK))
    ]
    azimuth, elevation, range_m = torch.cat(parts).unbind(1)
    return Bound(azimuth_rad=azimuth, elevation_rad=elevation, range_m=range_m)


def _deviations(physics: ScenePhysics, scenes: Scenes, symbols: Tensor) -> Tensor:
    """Bounds of azimuth, elevation and range, ``[B, 3, K]``."""
    blocks = sensing_blocks(physics, scenes, compress=False, double=True)
    columns = sensed(blocks, _source_rows(physics, scenes))
    wanted = symbols.to(torch.complex128) * scenes.active.unsqueeze(1)
    outside = _products_outside(columns, scenes.active)
    fisher = information(outside, wanted) * (2 / blocks.noise_power[:, None, None])
    active = scenes.active.repeat(1, 3)
    variance = _inverse_diagonal(fisher + torch.diag_embed((~active).double()))
    return variance.sqrt().masked_fill(~active, torch.nan).reshape(len(scenes), 3, -1)


def _source_rows(physics: ScenePhysics, scenes: Scenes) -> Tensor:
    """Steering vectors and their derivatives ``[B, 4 K, N]``, zero in inactive slots."""
    range_m = scenes.range_m.double().masked_fill(~scenes.active, 1.0)
    angles = (scenes.azimuth_rad.double(), scenes.elevation_rad.double())
    vectors, slopes = steering_derivatives(physics, *angles, range_m)
    rows = torch.cat((vectors.unsqueeze(2), slopes), dim=2) * scenes.active[..., None, None]
    return rows.transpose(1, 2).flatten(1, 2)


def _products_outside(columns: Tensor, active: Tensor) -> Tensor:
    """Inner products of the derivatives outside the span of the steering vectors."""
    count = active.shape[1]
    inner = columns.conj() @ columns.mT
    own, cross = inner[..., :count, :count], inner[..., :count, count:]
    padding = torch.diag_embed((~active).to(own.dtype)).unsqueeze(1)
    mixing: Tensor = torch.linalg.solve(own + padding, cross)
    return inner[..., count:, count:] - cross.mH @ mixing


def _inverse_diagonal(matrix: Tensor) -> Tensor:
    """Diagonal of the inverse of positive matrices, infinite where there is none."""
    # Radians and metres differ by orders of magnitude; on a unit diagonal the inverse is accurate.
    scale = matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    inverse = torch.linalg.inv_ex(matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)).inverse
    diagonal = inverse.diagonal(dim1=-2, dim2=-1) * scale.square()
    positive: Tensor = torch.where(diagonal > 0, diagonal, torch.inf)
    return positive


def sent_symbols(
    physics: ScenePhysics, scenes: Scenes, *, seed: int, split: Split, indices: Iterable[int]
) -> Tensor:
    """Return what the sources of ``scenes`` sent, as it arrives, complex128 ``[B, S, K]``.

    Scenes do not hold the symbols, so their random numbers are drawn again. The clean snapshots
    are the received steering vectors times these symbols: the loss of the path and the receiver's
    gain are in them. Inactive slots hold 0. S is 1 for constant symbols, else one a snapshot.

    Args:
        physics: what the scenes were drawn with.
        scenes: what :func:`reference_trainer.scenes.draw_scenes` gave for the same arguments.
        seed: seed of the data set.
        split: the split of the scenes.
        indices: the numbers of the scenes, in their order.

    Raises:
        ValueError: the scenes are not those of the seed, split and indices.

    Sync: one copy to the host, to compare the scenes.
    """
    stream = get_args(Split).index(split)
    variates = draw_variates(physics, [(seed, stream, int(index)) for index in indices])
    azimuth = torch.from_numpy(place_sources(physics, variates).azimuth_rad)
    if not torch.equal(azimuth, scenes.azimuth_rad.cpu()):
        raise ValueError(
            f"drawing the symbols of {len(scenes)} scenes again: seed {seed}, split {split!r} and "
            "the indices given belong to other scenes, or to another physics"
        )
    symbols = torch.from_numpy(variates.symbols[:, : physics.symbol_draws]).to(torch.complex128)
    range_m = scenes.range_m.double().masked_fill(~scenes.active, 1.0)
    arriving = symbols.to(scenes.active.device) * (scenes.active / range_m).unsqueeze(1)
    chunks = (slice(first, first + _CHUNK) for first in range(0, len(scenes), _CHUNK))
    return torch.cat([_at_unit_power(physics, scenes.select(r), arriving[r]) for r in chunks])


def _at_unit_power(physics: ScenePhysics, scenes: Scenes, arriving: Tensor) -> Tensor:
    """The symbols, scaled as the receiver scales its clean snapshots."""
    blocks: SensingBlocks = sensing_blocks(physics, scenes, compress=False, double=True)
    columns = sensed(blocks, _source_rows(physics, scenes)[:, : scenes.active.shape[1]])
    clean = torch.view_as_real((arriving.unsqueeze(-2) @ columns).squeeze(-2))
    power = clean.square().sum(dim=(1, 2, 3)) / blocks.equations
    return arriving * power.rsqrt()[:, None, None]

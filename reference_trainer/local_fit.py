"""A covariance fitted to the snapshots on a fine dictionary around places that somebody proposes.

The dictionary of ``sample_covariance`` covers everything with steps of half a beam, so its peaks lie a
good half degree off however little noise there is. Around a few proposed places (of a network, of a
first search) a fine one is affordable, and the same fixed point decides which of them the snapshots
support: a wrong proposal loses its power.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reference_trainer.covariance import principal_factor
from reference_trainer.sample_covariance import Atoms, measurements, refitted
from reference_trainer.search_grid import place_bounds, places_from_sines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.positions import Positions
    from reference_trainer.sample_covariance import Measured
    from reference_trainer.scenes import Scenes

STEPS = (0.009, 0.009, 0.03)
"""Distance of neighbours in sine of azimuth (half a degree), sine of elevation, inverse range in 1/m."""

REACH = (1, 1, 1)
"""Neighbours on either side of a proposal along each axis: 27 atoms for each."""

SCREENING_ROUNDS, KEPT_ATOMS = 3, 128
"""Rounds with all atoms, and the strongest that go on: what three rounds leave behind stays there."""


@torch.no_grad()
def locally_fitted_factor(
    physics: ScenePhysics,
    scenes: Scenes,
    proposals: Sequence[Positions],
    *,
    rounds: int = 15,
    columns: int = 16,
    chunk_scenes: int = 8,
) -> Tensor:
    """Return the factor of the covariance fitted around ``proposals``, complex64 ``[B, N, columns]``.

    Args:
        physics: geometry, field of view and the symbol model.
        scenes: what was received, the codes, the channel and the signal-to-noise ratio are read.
        proposals: places for the sources of every scene, of one or several proposers; they may be
            wrong, too many, or name a source twice.
        rounds: of the fixed point with the atoms that are kept.
        columns: strongest eigenvectors of the fitted covariance to keep.
        chunk_scenes: scenes worked on together: a few on a CPU, where large blocks of memory are paid for
            at every turn; more on a GPU.

    Raises:
        ValueError: no proposals, of another number of scenes, or an option below 1.

    Sync: waits for the device (Cholesky and eigenvalue routines). Memory: below 1 MB a scene of a
    chunk and proposer.
    """
    _require(scenes, proposals, rounds=rounds, columns=columns, chunk_scenes=chunk_scenes)
    parts = []
    for start in range(0, len(scenes), chunk_scenes):
        rows = slice(start, start + chunk_scenes)
        measured = measurements(scenes.select(rows), coherent=physics.symbols == "constant")
        atoms = _around(physics, [one.select(rows) for one in proposals], measured)
        atoms, _ = refitted(physics, measured, atoms, SCREENING_ROUNDS)
        atoms, vectors = refitted(physics, measured, atoms.strongest(KEPT_ATOMS), rounds)
        weighted = vectors * atoms.power.sqrt()[:, None, :]
        parts.append(principal_factor(weighted, columns=columns))
    return torch.cat(parts)


def _around(physics: ScenePhysics, proposals: Sequence[Positions], measured: Measured) -> Atoms:
    """The neighbourhoods of all proposals, with equal powers; those of inactive slots have none."""
    like = measured.noise
    lowest, highest = (bound.to(like) for bound in place_bounds(physics))
    axes = [
        torch.arange(-reach, reach + 1, device=like.device) * step
        for reach, step in zip(REACH, STEPS, strict=True)
    ]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    centres = torch.cat([_in_sines(one).to(like) for one in proposals], dim=1)
    active = torch.cat([one.active for one in proposals], dim=1)
    around = centres.unsqueeze(2) + offsets
    around[..., :2] = around[..., :2].clamp(-1, 1)
    places = torch.clamp(places_from_sines(around).flatten(1, 2), lowest, highest)
    share = active / (active.sum(-1, keepdim=True) * len(offsets)).clamp_min(1)
    power = share.to(like) * places.new_tensor(physics.elements)
    return Atoms(places, power.repeat_interleave(len(offsets), dim=1))


def _in_sines(positions: Positions) -> Tensor:
    """Sine of azimuth, sine of elevation and inverse range, ``[B, K, 3]``, finite in every slot."""
    range_m = torch.where(positions.active, positions.range_m, torch.ones_like(positions.range_m))
    angles = (positions.azimuth_rad.sin(), positions.elevation_rad.sin())
    return torch.stack((*angles, 1 / range_m), dim=-1)


def _require(scenes: Scenes, proposals: Sequence[Positions], **options: int) -> None:
    if not proposals:
        raise ValueError("fitting around proposals: none were given; pass at least one Positions")
    for one in proposals:
        if len(one) != len(scenes):
            raise ValueError(
                f"fitting around proposals: got proposals for {len(one)} scenes, expected "
                f"{len(scenes)}, one row a scene"
            )
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"fitting around proposals: {name} is {value}; expected at least 1")

"""Maximum-likelihood positions from the raw snapshots, from scratch, and the number of sources.

The symbols are unknown and solved for; the noise is white with known power, so the negative log
likelihood is the squared norm of what the sources leave unexplained, over the noise power.

Axes: B scenes, K slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reference_trainer.pursuit import pursue
from reference_trainer.residual_search import GridShape, make_grid
from reference_trainer.sensing import sensing_blocks
from reference_trainer.slots import alike, require_positive, to_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.positions import Positions
    from reference_trainer.scenes import Scenes

SEARCH_GRID = GridShape(azimuths=24, elevations=14, ranges=7)
"""A third of a beam apart; finer grids end in the same places, after the descent, and cost more."""

_FINAL_STEPS = 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LikelihoodFit:
    """Positions, and how well they explain the snapshots.

    Attributes:
        positions: where the sources are said to stand, ``[B, K]``.
        misfit: negative log likelihood but for a constant of the scene, float64 ``[B]``: the
            squared norm of the residual over the noise power.
    """

    positions: Positions
    misfit: Tensor

    def better_of(self, other: LikelihoodFit) -> LikelihoodFit:
        """Return, scene by scene, the fit with the smaller misfit; both of one likelihood. Sync: once."""
        rows = (other.misfit < self.misfit).nonzero().squeeze(-1)
        return LikelihoodFit(
            positions=self.positions.replaced(rows, other.positions.select(rows)),
            misfit=torch.minimum(self.misfit, other.misfit),
        )


def maximum_likelihood(
    physics: ScenePhysics,
    scenes: Scenes,
    num_sources: Tensor,
    *,
    grid: GridShape = SEARCH_GRID,
    chunk: int = 16,
) -> LikelihoodFit:
    """Return the most likely positions of a known number of sources, from scratch.

    Sources are found one after another on a grid; after each, all are moved together, and each is
    looked for again. Slots are in no particular order, the active ones first.

    Args:
        physics: geometry and symbol model.
        scenes: what was received and what the receiver knows; the truth is not read.
        num_sources: integers ``[B]``, 1 to the number of slots.
        grid: where sources are looked for.
        chunk: scenes worked on together; memory and speed depend on it, results to rounding.

    Raises:
        ValueError: ``num_sources`` has another shape or is out of range.

    Sync: often (which scenes have converged). Memory: 5 to 9 MB a scene of the chunk.
    """
    slots = scenes.active.shape[1]
    _require_numbers(num_sources, len(scenes), slots)
    require_positive(chunk=chunk)
    device = scenes.snapshots.device
    num_sources = num_sources.to(device)
    points = make_grid(physics, grid, device=device)
    parameters = torch.ones(len(scenes), slots, 3, dtype=torch.float64, device=device)
    misfit = torch.empty(len(scenes), dtype=torch.float64, device=device)
    for rows, count in alike(num_sources, chunk):
        blocks = sensing_blocks(physics, scenes.select(rows))
        fit = pursue(physics, blocks, points, count=count, final_steps=_FINAL_STEPS)[-1]
        parameters[rows, :count] = fit.parameters
        misfit[rows] = fit.residual / blocks.noise_power
    active = torch.arange(slots, device=device) < num_sources.unsqueeze(-1)
    return LikelihoodFit(positions=to_positions(parameters, active, scenes), misfit=misfit)


def fits_of_every_number(
    physics: ScenePhysics, scenes: Scenes, *, grid: GridShape = SEARCH_GRID, chunk: int = 16
) -> list[LikelihoodFit]:
    """Return the most likely positions of 1, 2, ... sources, up to the number of slots.

    The fit of a number is that of :func:`maximum_likelihood` for it; together they cost as much as
    the last one.

    Args:
        physics: geometry and symbol model.
        scenes: what was received and what the receiver knows; the truth is not read.
        grid: where sources are looked for.
        chunk: scenes worked on together; memory and speed depend on it, results to rounding.

    Sync: often (which scenes have converged). Memory: 5 to 9 MB a scene of the chunk.
    """
    require_positive(chunk=chunk)
    slots, device = scenes.active.shape[1], scenes.snapshots.device
    points = make_grid(physics, grid, device=device)
    parameters = torch.ones(slots, len(scenes), slots, 3, dtype=torch.float64, device=device)
    misfit = torch.empty(slots, len(scenes), dtype=torch.float64, device=device)
    for first in range(0, len(scenes), chunk):
        rows = slice(first, first + chunk)
        blocks = sensing_blocks(physics, scenes.select(rows))
        fits = pursue(physics, blocks, points, count=slots, final_steps=_FINAL_STEPS)
        for number, fit in enumerate(fits, start=1):
            parameters[number - 1, rows, :number] = fit.parameters
            misfit[number - 1, rows] = fit.residual / blocks.noise_power
    results = []
    for number in range(1, slots + 1):
        active = (torch.arange(slots, device=device) < number).expand(len(scenes), -1)
        positions = to_positions(parameters[number - 1], active, scenes)
        results.append(LikelihoodFit(positions=positions, misfit=misfit[number - 1]))
    return results


def number_by_bic(physics: ScenePhysics, fits: Sequence[LikelihoodFit]) -> Tensor:
    """Return the number of sources with the best Bayesian information criterion, int64 ``[B]``.

    Each real number that was fitted costs half the logarithm of the real samples that determine
    it: all ``2 L M`` for a position, but only those of its own snapshots for a symbol.

    Args:
        physics: says how many symbols a source has.
        fits: the fits of 1, 2, ... sources, as :func:`fits_of_every_number` gives them.

    Raises:
        ValueError: no fits.

    Sync: none.
    """
    if not fits:
        raise ValueError("choosing the number of sources: no fits were given; pass at least one")
    samples = 2 * physics.snapshots * physics.antennas
    draws = physics.symbol_draws
    price = 1.5 * math.log(samples) + draws * math.log(samples / draws)
    costs = [fit.misfit + number * price for number, fit in enumerate(fits, start=1)]
    return torch.stack(costs).argmin(dim=0) + 1


def _require_numbers(num_sources: Tensor, scenes: int, slots: int) -> None:
    if tuple(num_sources.shape) != (scenes,):
        raise ValueError(
            f"fitting {scenes} scenes: got numbers of sources of shape "
            f"{tuple(num_sources.shape)}, expected ({scenes},)"
        )
    low, high = (int(edge) for edge in torch.aminmax(num_sources))
    if low < 1 or high > slots:
        raise ValueError(
            f"fitting {scenes} scenes: numbers of sources reach from {low} to {high}; "
            f"expected 1 to {slots}"
        )

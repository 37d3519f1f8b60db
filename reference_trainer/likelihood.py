"""Maximum-likelihood positions from the raw snapshots, from scratch or from a start.

The symbols are unknown and solved for; the noise is white with known power, so the negative log
likelihood is the squared norm of what the sources leave unexplained, over the noise power.

Axes: B scenes, K slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reference_trainer.descent import Fit, descend
from reference_trainer.positions import Positions
from reference_trainer.pursuit import mend, pursue
from reference_trainer.residual_search import GridShape, make_grid
from reference_trainer.sensing import sensing_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.scenes import Scenes

SEARCH_GRID = GridShape(azimuths=24, elevations=14, ranges=7)
"""A third of a beam apart; finer grids end in the same places, after the descent, and cost more."""

REPLACEMENT_GRID = GridShape(azimuths=18, elevations=10, ranges=5)
"""Half a beam apart: enough to mend one source among others that are right."""

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


def refine(
    physics: ScenePhysics,
    scenes: Scenes,
    start: Positions,
    *,
    iterations: int = 12,
    replacements: int = 3,
    tolerance: float = 1.0,
    grid: GridShape = REPLACEMENT_GRID,
    chunk: int = 32,
) -> LikelihoodFit:
    """Return the most likely positions near ``start``, slot by slot.

    All coordinates of all active sources of a scene move together. Sources stay in the region where
    sources can be, widened a little. A scene without sources keeps none.

    Args:
        physics: geometry and symbol model.
        scenes: what was received and what the receiver knows; the truth is not read.
        start: a position for each source, within about half a beam (4 degrees) of it.
        iterations: the most steps of the descent.
        replacements: how many sources of a scene may be given up and looked for on a grid, the
            weakest first: for starts that are wrong in some sources. 0 only descends.
        tolerance: replace only in scenes whose residual lies more than this many standard
            deviations above that of noise alone.
        grid: where replacements are looked for.
        chunk: scenes worked on together; memory and speed depend on it, results to rounding.

    Raises:
        ValueError: ``start`` has other scenes, an active source that is not finite, or an option
            is out of range.

    Sync: often (which scenes have converged). Memory: about 0.5 MB a scene of the chunk, with
    replacements 3 MB more.
    """
    _require_start(scenes, start)
    _require_positive(iterations=iterations, chunk=chunk)
    if replacements < 0:
        raise ValueError(f"refining positions: replacements is {replacements}; expected 0 or more")
    device = scenes.snapshots.device
    start = start.to(device)
    points = make_grid(physics, grid, device=device) if replacements else None
    parameters = _parameters(start)
    misfit = torch.empty(len(scenes), dtype=torch.float64, device=device)
    for rows, count in _alike(start.num_sources, chunk):
        blocks = sensing_blocks(physics, scenes.select(rows))
        slots = _slots(start.active[rows], count)
        fit = Fit(parameters=parameters[rows, :0], residual=blocks.energy)
        if count:
            begin = parameters[rows.unsqueeze(-1), slots]
            fit = descend(physics, blocks, begin, iterations=iterations)
        if count and points is not None:
            fit = mend(physics, blocks, points, fit, rounds=replacements, tolerance=tolerance)
        parameters[rows.unsqueeze(-1), slots] = fit.parameters
        misfit[rows] = fit.residual / blocks.noise_power
    return LikelihoodFit(positions=_positions(parameters, start.active, scenes), misfit=misfit)


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
    _require_positive(chunk=chunk)
    device = scenes.snapshots.device
    num_sources = num_sources.to(device)
    points = make_grid(physics, grid, device=device)
    parameters = torch.ones(len(scenes), slots, 3, dtype=torch.float64, device=device)
    misfit = torch.empty(len(scenes), dtype=torch.float64, device=device)
    for rows, count in _alike(num_sources, chunk):
        blocks = sensing_blocks(physics, scenes.select(rows))
        fit = pursue(physics, blocks, points, count=count, final_steps=_FINAL_STEPS)[-1]
        parameters[rows, :count] = fit.parameters
        misfit[rows] = fit.residual / blocks.noise_power
    active = torch.arange(slots, device=device) < num_sources.unsqueeze(-1)
    return LikelihoodFit(positions=_positions(parameters, active, scenes), misfit=misfit)


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
    _require_positive(chunk=chunk)
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
        positions = _positions(parameters[number - 1], active, scenes)
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


def _alike(numbers: Tensor, chunk: int) -> Iterator[tuple[Tensor, int]]:
    """Yield scenes of equally many sources, at most ``chunk`` of them, and that number."""
    for count in range(int(numbers.max()) + 1):
        scenes = (numbers == count).nonzero().squeeze(-1)

        yield from ((rows, count) for rows in torch.split(scenes, chunk) if len(rows))


def _slots(active: Tensor, count: int) -> Tensor:
    """The indices of the active slots, in order, ``[B, count]``."""
    return active.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :count]


def _parameters(positions: Positions) -> Tensor:
    """Azimuth, elevation, 1 / range, float64 ``[B, K, 3]``; inactive slots hold finite numbers."""
    inverse_range = positions.range_m.double().clamp_min(1e-3).reciprocal()
    angles = (positions.azimuth_rad.double(), positions.elevation_rad.double())
    return torch.stack((*angles, inverse_range), dim=-1)


def _positions(parameters: Tensor, active: Tensor, scenes: Scenes) -> Positions:
    azimuth, elevation, inverse_range = parameters.unbind(-1)
    dtype = scenes.azimuth_rad.dtype
    return Positions(
        azimuth_rad=azimuth.to(dtype),
        elevation_rad=elevation.to(dtype),
        range_m=inverse_range.reciprocal().to(dtype),
        active=active,
    )


def _require_start(scenes: Scenes, start: Positions) -> None:
    if len(start) != len(scenes):
        raise ValueError(
            f"refining positions: got positions of {len(start)} scenes for {len(scenes)} scenes"
        )
    finite = torch.isfinite(_parameters(start)).all(dim=-1)
    wrong = int((start.active & ~finite).sum())
    if wrong:
        raise ValueError(
            f"refining positions: {wrong} active sources of the start are NaN or infinite; "
            "expected a number for every coordinate"
        )


def _require_positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"fitting positions: {name} is {value}; expected at least 1")


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

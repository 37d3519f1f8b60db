"""The most likely positions from starts that somebody proposes: a network, MUSIC, the truth.

The likelihood is that of ``likelihood``. Its local minima are many, so one start is a bet: of two that
err in different places, the better is right far more often.

Axes: B scenes, K slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reference_trainer.descent import Fit, descend
from reference_trainer.likelihood import LikelihoodFit
from reference_trainer.pursuit import mend
from reference_trainer.residual_search import GridShape, grid_response, make_grid
from reference_trainer.sensing import sensing_blocks
from reference_trainer.slots import (
    active_slots,
    alike,
    require_positive,
    require_start,
    to_parameters,
    to_positions,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.positions import Positions
    from reference_trainer.residual_search import Grid
    from reference_trainer.scenes import Scenes
    from reference_trainer.sensing import SensingBlocks

REPLACEMENT_GRID = GridShape(azimuths=18, elevations=10, ranges=5)
"""Half a beam apart: enough to mend one source among others that are right."""

_ITERATIONS, _REPLACEMENTS, _CHUNK = 6, 5, 32


def refine(
    physics: ScenePhysics,
    scenes: Scenes,
    *starts: Positions,
    iterations: int = _ITERATIONS,
    replacements: int = _REPLACEMENTS,
    grid: GridShape = REPLACEMENT_GRID,
    chunk: int = _CHUNK,
) -> LikelihoodFit:
    """Return the most likely positions that are reached from ``starts``, in the slots of the first.

    From each start all coordinates of all active sources of a scene move together. Scene by scene the
    most likely end is kept, and its wrong sources are looked for again. Sources stay in the region
    where sources can be, widened a little. A scene without sources keeps none.

    Args:
        physics: geometry and symbol model.
        scenes: what was received and what the receiver knows; the truth is not read.
        starts: one or more, each with a position for every source, within about half a beam (4
            degrees) of it but for a few that may be wrong. In a scene all name equally many.
        iterations: the most steps of the descent from a start, and of the last one from the end
            that is kept.
        replacements: how many sources of a scene may be given up and looked for on a grid, the
            weakest first, as long as that helps. 0 only descends.
        grid: where replacements are looked for.
        chunk: scenes worked on together; memory and speed depend on it, results to rounding.

    Raises:
        ValueError: no starts; a start has other scenes, another number of sources in one of them
            than the first start, or an active source that is not finite; an option is out of range.

    Sync: often (which scenes have converged). Memory: about 0.5 MB a scene of the chunk, with
    replacements 3 MB more.
    """
    return _refined(
        physics,
        scenes,
        starts,
        together=True,
        iterations=iterations,
        replacements=replacements,
        grid=grid,
        chunk=chunk,
    )[0]


def refine_each(physics: ScenePhysics, scenes: Scenes, *starts: Positions) -> list[LikelihoodFit]:
    """Return for each of ``starts`` what :func:`refine` gives for it alone, in less time.

    Args, errors, Sync and Memory: as :func:`refine`.
    """
    return _refined(physics, scenes, starts, together=False)


def _refined(
    physics: ScenePhysics,
    scenes: Scenes,
    starts: Sequence[Positions],
    *,
    together: bool,
    iterations: int = _ITERATIONS,
    replacements: int = _REPLACEMENTS,
    grid: GridShape = REPLACEMENT_GRID,
    chunk: int = _CHUNK,
) -> list[LikelihoodFit]:
    """One fit for all starts together, or one for each."""
    _require(scenes, starts, iterations=iterations, chunk=chunk, replacements=replacements)
    device = scenes.snapshots.device
    begun = [start.to(device) for start in starts]
    points = make_grid(physics, grid, device=device) if replacements else None
    found = [to_parameters(start) for start in (begun[:1] if together else begun)]
    misfits = [torch.empty(len(scenes), dtype=torch.float64, device=device) for _ in found]
    for rows, count in alike(begun[0].num_sources, chunk):
        blocks = sensing_blocks(physics, scenes.select(rows))
        places = [_active_parameters(start.select(rows), count) for start in begun]
        fits = [Fit(parameters=place, residual=blocks.energy) for place in places[: len(found)]]
        if count:
            ends = [descend(physics, blocks, place, iterations=iterations) for place in places]
            ends = [_best(ends)] if together else ends
            fits = _settled(physics, blocks, points, ends, iterations, replacements)
        for start, parameters, misfit, fit in zip(begun, found, misfits, fits, strict=False):
            slots = active_slots(start.active[rows], count)
            parameters[rows.unsqueeze(-1), slots] = fit.parameters
            misfit[rows] = fit.residual / blocks.noise_power
    return [
        LikelihoodFit(positions=to_positions(parameters, start.active, scenes), misfit=misfit)
        for start, parameters, misfit in zip(begun, found, misfits, strict=False)
    ]


def _active_parameters(positions: Positions, count: int) -> Tensor:
    """The parameters ``[B, count, 3]`` of the active slots."""
    slots = active_slots(positions.active, count)
    return to_parameters(positions).gather(1, slots.unsqueeze(-1).expand(-1, -1, 3))


def _settled(
    physics: ScenePhysics,
    blocks: SensingBlocks,
    points: Grid | None,
    ends: Sequence[Fit],
    iterations: int,
    replacements: int,
) -> list[Fit]:
    """The fits of scenes with as many sources, mended on ``points`` and settled again."""
    if points is not None:
        response = grid_response(blocks, points)
        ends = [mend(physics, blocks, points, response, one, rounds=replacements) for one in ends]
    return [descend(physics, blocks, one.parameters, iterations=iterations) for one in ends]


def _best(ends: Sequence[Fit]) -> Fit:
    """Of every scene the best of some ends."""
    best, *others = ends
    for end in others:
        best = best.better_of(end)
    return best


def _require(scenes: Scenes, starts: Sequence[Positions], **options: int) -> None:
    if not starts:
        raise ValueError("refining positions: no start was given; pass at least one Positions")
    for start in starts:
        require_start(scenes, start)
        numbers, first = start.num_sources.cpu(), starts[0].num_sources.cpu()
        if not torch.equal(numbers, first):
            scene = int((numbers != first).nonzero()[0])
            raise ValueError(
                f"refining positions: starts disagree on the number of sources, in scene {scene} "
                f"{int(first[scene])} and {int(numbers[scene])}; expected the same in every start"
            )
    replacements = options.pop("replacements")
    require_positive(**options)
    if replacements < 0:
        raise ValueError(f"refining positions: replacements is {replacements}; expected 0 or more")

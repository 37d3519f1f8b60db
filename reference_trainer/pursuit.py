"""Finding sources one after another: each joins the others where it explains the most.

A source found early stands where it explains the later ones too, so all are moved together after
every addition, and each is taken out and looked for again once (Newtonized orthogonal matching
pursuit). The same step mends a start with wrong sources: the one that explains least is looked
for again.

Axes: B scenes of equally many sources K, S blocks, R equations of a block, G grid points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reference_trainer.descent import Fit, descend
from reference_trainer.geometry import steering_vectors
from reference_trainer.residual_search import GridResponse, gains, grid_response
from reference_trainer.sensing import sensed

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.residual_search import Grid
    from reference_trainer.sensing import SensingBlocks

_STEPS_AFTER_A_CHANGE = 8
_WORTHWHILE = 0.8
"""A grid point misses the source by up to half a cell: this share of the old gain is promising."""


def pursue(
    physics: ScenePhysics, blocks: SensingBlocks, grid: Grid, *, count: int, final_steps: int
) -> list[Fit]:
    """Return a fit of 1, 2, ... ``count`` sources to every scene.

    Args:
        physics: geometry, and the region where sources can be.
        blocks: the equations of the scenes.
        grid: where new sources are looked for.
        count: number of sources of the last fit.
        final_steps: the most steps of the descent that ends every fit.

    Sync: once every few steps of the descent. Memory: 8 S R G bytes a scene.
    """
    response = grid_response(blocks, grid)
    fits: list[Fit] = []
    parameters = grid.points.new_empty((len(blocks), 0, 3))
    for number in range(1, count + 1):
        start = _with_best(physics, blocks, grid, response, parameters)
        fit = descend(physics, blocks, start, iterations=_STEPS_AFTER_A_CHANGE)
        for _ in range(number if number > 1 else 0):
            fit = _redetect_first(physics, blocks, grid, response, fit)
        fit = descend(physics, blocks, fit.parameters, iterations=final_steps)
        fits.append(fit)
        parameters = fit.parameters
    return fits


def _redetect_first(
    physics: ScenePhysics, blocks: SensingBlocks, grid: Grid, response: GridResponse, fit: Fit
) -> Fit:
    """Look for the first source again, which comes last then, old or new."""
    rest = fit.parameters[:, 1:]
    start = _with_best(physics, blocks, grid, response, rest)
    kept = Fit(parameters=torch.cat((rest, fit.parameters[:, :1]), dim=1), residual=fit.residual)
    return kept.better_of(descend(physics, blocks, start, iterations=_STEPS_AFTER_A_CHANGE))


def _with_best(
    physics: ScenePhysics,
    blocks: SensingBlocks,
    grid: Grid,
    response: GridResponse,
    parameters: Tensor,
) -> Tensor:
    """Add the grid point that lowers the residual most: ``[B, K, 3]`` to ``[B, K + 1, 3]``."""
    best = _best_points(physics, blocks, grid, response, parameters)[1]
    return torch.cat((parameters, best.unsqueeze(1)), dim=1)


def _best_points(
    physics: ScenePhysics,
    blocks: SensingBlocks,
    grid: Grid,
    response: GridResponse,
    parameters: Tensor,
) -> tuple[Tensor, Tensor]:
    """By how much the best point lowers the residual, ``[B]``, and the point, ``[B, 3]``."""
    columns = _received(physics, blocks, parameters)
    gain, index = gains(response, blocks.target, columns).max(dim=-1)
    return gain, grid.points[index]


def _received(physics: ScenePhysics, blocks: SensingBlocks, parameters: Tensor) -> Tensor:
    """Received steering vectors, complex128 ``[B, S, K, R]``."""
    azimuth, elevation, inverse_range = parameters.unbind(-1)
    vectors = steering_vectors(physics, azimuth, elevation, inverse_range.reciprocal())
    return sensed(blocks, vectors).to(torch.complex128)


def mend(
    physics: ScenePhysics,
    blocks: SensingBlocks,
    grid: Grid,
    response: GridResponse,
    fit: Fit,
    *,
    rounds: int,
) -> Fit:
    """Return the fit with wrong sources replaced.

    In each round the source that explains least is taken out, and looked for again on the grid. A
    scene in which that did not help has no further round. Every scene has a first one: at a low
    signal-to-noise ratio a source may be wrong though noise alone would explain what is left.

    Args:
        physics: geometry, and the region where sources can be.
        blocks: the equations of the scenes.
        grid: where sources are looked for.
        response: what the scenes would receive of its points.
        fit: where the descent ended.
        rounds: most sources replaced in a scene.

    Sync: once a round and once every few steps of the descent.
    """
    parameters, residual = fit.parameters.clone(), fit.residual.clone()
    scenes = torch.arange(len(blocks), device=residual.device)
    for _ in range(rounds):
        replaced, start = _without_weakest(physics, blocks, grid, response, parameters[scenes])
        going = replaced.nonzero().squeeze(-1)
        if not len(going):
            break
        tried = blocks.select(going)
        new = descend(physics, tried, start[going], iterations=_STEPS_AFTER_A_CHANGE)
        helped = new.residual < residual[scenes[going]] - 0.5 * tried.noise_power
        going = going[helped]
        if not len(going):
            break
        scenes, blocks, response = scenes[going], blocks.select(going), response.select(going)
        parameters[scenes], residual[scenes] = new.parameters[helped], new.residual[helped]
    return Fit(parameters=parameters, residual=residual)


def _without_weakest(
    physics: ScenePhysics,
    blocks: SensingBlocks,
    grid: Grid,
    response: GridResponse,
    parameters: Tensor,
) -> tuple[Tensor, Tensor]:
    """Whether a replacement promises anything, ``[B]``, and the sources with it, ``[B, K, 3]``."""
    shares = explained_alone(_received(physics, blocks, parameters), blocks.target)
    share, weakest = shares.min(dim=-1)
    slots = torch.arange(parameters.shape[1], device=parameters.device)
    kept = parameters[slots != weakest.unsqueeze(-1)].reshape(len(parameters), -1, 3)
    gain, point = _best_points(physics, blocks, grid, response, kept)
    start = torch.where(
        (slots == weakest.unsqueeze(-1)).unsqueeze(-1), point.unsqueeze(1), parameters
    )
    return gain > _WORTHWHILE * share, start


def explained_alone(columns: Tensor, target: Tensor) -> Tensor:
    """Return by how much the residual would rise without each source, ``[B, K]``.

    Args:
        columns: received steering vectors, complex128 ``[B, S, K, R]``.
        target: what was received, complex128 ``[B, S, R]``.
    """
    inner = columns.conj() @ columns.mT
    loaded = inner + 1e-9 * torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    inverse: Tensor = torch.linalg.inv_ex(loaded).inverse
    matched = columns.conj() @ target.unsqueeze(-1)
    power = torch.view_as_real((inverse @ matched).squeeze(-1)).square().sum(-1)
    return (power / inverse.diagonal(dim1=-2, dim2=-1).real).sum(dim=1)

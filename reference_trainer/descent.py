"""Levenberg-Marquardt on the positions of all sources of a scene at once, scenes in a batch.

Positions are rows of (azimuth, elevation, 1 / range): the phase over the RIS is nearly linear in
1 / range, not in the range. They stay in the region where sources can be, widened by a margin.

Axes: B scenes, K sources, all of them active.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reference_trainer.projection import Projection, project
from reference_trainer.sensing import SensingBlocks, sensed, steering_derivatives

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.physics import ScenePhysics

ANGLE_MARGIN_RAD = math.radians(2.0)
"""How far estimates may lie outside the field of view."""

RANGE_MARGIN = 1.1
"""Estimates of the range lie between the smallest over this and the largest times this."""

_FIRST_DAMPING = 1e-2
_ROUND = 4
"""Steps between two looks at which scenes have converged."""

_WORTH_COPYING = 0.75
"""Converged scenes are set aside when no more than this share still moves."""

_LEAST_DAMPING = 1e-6
_LONGEST_STEP_RAD = 0.1
_CONVERGED = 1e-3
"""Stop when a step promises less than this share of the noise power: far under any error bar."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """Sources of B scenes as the descent left them.

    Attributes:
        parameters: azimuth, elevation (radians) and 1 / range (per metre), float64 ``[B, K, 3]``.
        residual: squared norm of what they leave unexplained, float64 ``[B]``.
    """

    parameters: Tensor
    residual: Tensor

    def better_of(self, other: Fit) -> Fit:
        """Return, scene by scene, the fit with the smaller residual."""
        mine = self.residual <= other.residual
        return Fit(
            parameters=torch.where(mine[:, None, None], self.parameters, other.parameters),
            residual=torch.where(mine, self.residual, other.residual),
        )


def allowed_region(physics: ScenePhysics) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest parameters ``[3]``, float64."""
    widest = math.radians(89.0)
    azimuth = min(math.radians(physics.azimuth_half_width_deg) + ANGLE_MARGIN_RAD, widest)
    elevation = min(math.radians(physics.elevation_half_width_deg) + ANGLE_MARGIN_RAD, widest)
    farthest_m = physics.max_range_m * RANGE_MARGIN
    nearest_m = physics.min_range_m / RANGE_MARGIN
    low = torch.tensor((-azimuth, -elevation, 1 / farthest_m), dtype=torch.float64)
    high = torch.tensor((azimuth, elevation, 1 / nearest_m), dtype=torch.float64)
    return low, high


def projection_at(physics: ScenePhysics, blocks: SensingBlocks, parameters: Tensor) -> Projection:
    """Return the residual with slope and curvature in the parameters ``[B, K, 3]``. Sync: none."""
    range_m = parameters[..., 2].reciprocal()
    vectors, slopes = steering_derivatives(physics, parameters[..., 0], parameters[..., 1], range_m)
    by_range = slopes[..., 2, :] * -range_m.square().unsqueeze(-1)
    rows = torch.cat((vectors, slopes[..., 0, :], slopes[..., 1, :], by_range), dim=1)
    return project(sensed(blocks, rows), blocks.target, blocks.energy)


def descend(physics: ScenePhysics, blocks: SensingBlocks, start: Tensor, *, iterations: int) -> Fit:
    """Return the local minimum of the residual near ``start``, each scene damped on its own.

    A step is taken where it lowers the residual; elsewhere the damping rises. Every few steps the
    scenes that have converged are set aside.

    Args:
        physics: geometry, and the region where sources can be.
        blocks: the equations of the scenes.
        start: float64 ``[B, K, 3]``.
        iterations: the most steps tried on a scene.

    Sync: once every few iterations, to see which scenes have converged.
    """
    region = tuple(edge.to(start.device) for edge in allowed_region(physics))
    damping = torch.full_like(blocks.energy, _FIRST_DAMPING)
    state = _State(start.clamp(*region), damping, torch.ones_like(damping, dtype=torch.bool))
    parameters, residual = start.clone(), torch.empty_like(damping)
    scenes = torch.arange(len(blocks), device=start.device)
    for first in range(0, iterations, _ROUND):
        steps = min(_ROUND, iterations - first)
        state, found = _round(physics, blocks, state, region, steps=steps)
        parameters[scenes], residual[scenes] = state.parameters, found
        going = state.moving.nonzero().squeeze(-1)
        if not len(going):
            break
        if len(going) <= _WORTH_COPYING * len(scenes):
            scenes, blocks, state = scenes[going], blocks.select(going), state.select(going)
    return Fit(parameters=parameters, residual=residual)


@dataclass(frozen=True, slots=True)
class _State:
    """Where the descent stands: parameters ``[B, K, 3]``, damping ``[B]``, and who still moves."""

    parameters: Tensor
    damping: Tensor
    moving: Tensor

    def select(self, index: Tensor) -> _State:
        return _State(self.parameters[index], self.damping[index], self.moving[index])


def _round(
    physics: ScenePhysics,
    blocks: SensingBlocks,
    state: _State,
    region: tuple[Tensor, ...],
    *,
    steps: int,
) -> tuple[_State, Tensor]:
    """Try some steps: the new state, and the residual ``[B]``."""
    parameters, damping, moving = state.parameters, state.damping, state.moving
    here = projection_at(physics, blocks, parameters)
    for _ in range(steps):
        step = _step(here, damping, _blocked(parameters, here.slope, region))
        trial = (parameters + _by_source(step)).clamp(*region)
        there = projection_at(physics, blocks, trial)
        # A scene that has converged stands still, or it would depend on its neighbours in the batch.
        better = moving & (there.residual < here.residual)
        moving = moving & ((step * here.slope).sum(-1) > _CONVERGED * blocks.noise_power)
        parameters = torch.where(better[:, None, None], trial, parameters)
        here = there.where(better, here)
        damping = torch.where(better, (damping / 5).clamp_min(_LEAST_DAMPING), damping * 8)
    return _State(parameters, damping, moving), here.residual


def _by_source(flat: Tensor) -> Tensor:
    """``[B, 3 K]``, coordinate slow, as ``[B, K, 3]``."""
    return flat.reshape(len(flat), 3, -1).mT


def _blocked(parameters: Tensor, slope: Tensor, region: tuple[Tensor, ...]) -> Tensor:
    """Which coordinates ``[B, 3 K]`` stand at the edge of the region and want out."""
    low, high = region
    downhill = _by_source(slope)
    out = ((parameters <= low) & (downhill < 0)) | ((parameters >= high) & (downhill > 0))
    return out.mT.flatten(1)


def _step(here: Projection, damping: Tensor, blocked: Tensor) -> Tensor:
    """The damped Newton step ``[B, 3 K]``: nothing blocked moves, no angle further than the limit."""
    diagonal = here.curvature.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.clamp_min(1e-30).rsqrt().masked_fill(blocked, 0.0)
    unit = here.curvature * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    loaded = unit + torch.diag_embed(damping.unsqueeze(-1) + blocked.to(scale.dtype))
    solved = torch.linalg.solve_ex(loaded, (here.slope * scale).unsqueeze(-1)).result
    step: Tensor = solved.squeeze(-1) * scale
    angles = step[:, : 2 * (step.shape[1] // 3)].abs().amax(-1, keepdim=True)
    return step * (_LONGEST_STEP_RAD / angles.clamp_min(_LONGEST_STEP_RAD))

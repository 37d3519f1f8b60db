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

FIRST_DAMPING = 1e-2
_ROUND = 4
"""Steps between two looks at which scenes have converged."""

_WORTH_COPYING = 0.75
"""Converged scenes are set aside when no more than this share still moves."""

_LEAST_DAMPING = 1e-6
_LONGEST_STEP_RAD = 0.1
CONVERGED = 1e-3
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
    columns = received_columns(physics, blocks, parameters)
    return project(columns, blocks.target, blocks.energy)


def received_columns(physics: ScenePhysics, blocks: SensingBlocks, parameters: Tensor) -> Tensor:
    """Return what is received of the sources and of their derivatives, complex ``[B, S, 4 K, R]``.

    The K steering vectors, then their derivatives in azimuth, elevation and 1 / range. Sync: none.
    """
    range_m = parameters[..., 2].reciprocal()
    vectors, slopes = steering_derivatives(physics, parameters[..., 0], parameters[..., 1], range_m)
    by_range = slopes[..., 2, :] * -range_m.square().unsqueeze(-1)
    rows = torch.cat((vectors, slopes[..., 0, :], slopes[..., 1, :], by_range), dim=1)
    return sensed(blocks, rows)


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
    state = _first(physics, blocks, start.clamp(*region))
    parameters, residual = start.clone(), torch.empty_like(state.damping)
    scenes = torch.arange(len(blocks), device=start.device)
    for first in range(0, iterations, _ROUND):
        for _ in range(min(_ROUND, iterations - first)):
            state = _stepped(physics, blocks, state, region)
        parameters[scenes], residual[scenes] = state.parameters, state.here.residual
        going = state.moving.nonzero().squeeze(-1)
        if not len(going):
            break
        if len(going) <= _WORTH_COPYING * len(scenes):
            scenes, blocks, state = scenes[going], blocks.select(going), state.select(going)
    return Fit(parameters=parameters, residual=residual)


@dataclass(frozen=True, slots=True)
class _State:
    """Where the descent stands, what is seen there, damping ``[B]``, and who still moves."""

    parameters: Tensor
    here: Projection
    damping: Tensor
    moving: Tensor

    def select(self, index: Tensor) -> _State:
        here = self.here.select(index)
        return _State(self.parameters[index], here, self.damping[index], self.moving[index])


def _first(physics: ScenePhysics, blocks: SensingBlocks, parameters: Tensor) -> _State:
    damping = torch.full_like(blocks.energy, FIRST_DAMPING)
    moving = torch.ones_like(damping, dtype=torch.bool)
    return _State(parameters, projection_at(physics, blocks, parameters), damping, moving)


def _stepped(
    physics: ScenePhysics, blocks: SensingBlocks, state: _State, region: tuple[Tensor, ...]
) -> _State:
    """Try one step of every scene that still moves."""
    parameters, here, damping = state.parameters, state.here, state.damping
    step = damped_step(
        here.slope, here.curvature, damping, blocked_by(region, parameters, here.slope)
    )
    trial = (parameters + by_source(step)).clamp(*region)
    there = projection_at(physics, blocks, trial)
    # A scene that has converged stands still, or it would depend on its neighbours in the batch.
    better = state.moving & (there.residual < here.residual)
    moving = state.moving & ((step * here.slope).sum(-1) > CONVERGED * blocks.noise_power)
    parameters = torch.where(better[:, None, None], trial, parameters)
    return _State(parameters, there.where(better, here), next_damping(damping, better), moving)


def by_source(flat: Tensor) -> Tensor:
    """Return ``[B, 3 K]``, coordinate slow, as ``[B, K, 3]``."""
    return flat.reshape(len(flat), 3, -1).mT


def blocked_by(region: tuple[Tensor, ...], parameters: Tensor, slope: Tensor) -> Tensor:
    """Return which coordinates ``[B, 3 K]`` stand at the edge of the region and want out."""
    low, high = region
    downhill = by_source(slope)
    out = ((parameters <= low) & (downhill < 0)) | ((parameters >= high) & (downhill > 0))
    return out.mT.flatten(1)


def damped_step(slope: Tensor, curvature: Tensor, damping: Tensor, blocked: Tensor) -> Tensor:
    """Return the damped Newton step ``[B, 3 K]``.

    Nothing blocked moves, and no angle further than the limit.

    Args:
        slope: downhill, float64 ``[B, 3 K]``.
        curvature: float64 ``[B, 3 K, 3 K]``.
        damping: share of each diagonal element that is added to it, float64 ``[B]``.
        blocked: bool ``[B, 3 K]``.

    Sync: none on the CPU; on CUDA as ``torch.linalg.solve_ex``.
    """
    diagonal = curvature.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.clamp_min(1e-30).rsqrt().masked_fill(blocked, 0.0)
    unit = curvature * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    loaded = unit + torch.diag_embed(damping.unsqueeze(-1) + blocked.to(scale.dtype))
    solved = torch.linalg.solve_ex(loaded, (slope * scale).unsqueeze(-1)).result
    step: Tensor = solved.squeeze(-1) * scale
    angles = step[:, : 2 * (step.shape[1] // 3)].abs().amax(-1, keepdim=True)
    return step * (_LONGEST_STEP_RAD / angles.clamp_min(_LONGEST_STEP_RAD))


def next_damping(damping: Tensor, better: Tensor) -> Tensor:
    """Return less damping where a step was better, more elsewhere, ``[B]``. Sync: none."""
    return torch.where(better, (damping / 5).clamp_min(_LEAST_DAMPING), damping * 8)

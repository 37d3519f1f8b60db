"""Unconditional (stochastic) maximum likelihood: the symbols are random, and integrated out.

The likelihood of ``likelihood`` takes every symbol for an unknown number. With a new symbol each snapshot
those are many (80 complex ones for five sources), and each fits noise as well as signal. Here a source
sends symbols CN(0, p) of an unknown power p, so ``y_s ~ CN(0, A_s P A_s^H + sigma^2 I)`` in block s. What
is minimised over positions and powers is the negative log likelihood

    sum_s  log det(I + P G_s / sigma^2) + (|y_s|^2 - b_s^H W_s b_s) / sigma^2

with ``G_s = A_s^H A_s``, ``b_s = A_s^H y_s``, ``W_s = (G_s + sigma^2 P^-1)^-1``. The mean of the symbols
given the snapshots is ``W b``, their covariance ``sigma^2 W``; the powers follow by expectation
maximisation, the positions by Levenberg-Marquardt.

Source: P. Stoica, A. Nehorai, "Performance study of conditional and unconditional direction-of-arrival
estimation", IEEE Trans. ASSP 38 (1990); here the steering matrix changes from block to block.

Axes: B scenes, S blocks, R equations of a block, K sources, all of them active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reference_trainer.descent import (
    CONVERGED,
    FIRST_DAMPING,
    allowed_region,
    blocked_by,
    by_source,
    damped_step,
    next_damping,
    received_columns,
)
from reference_trainer.likelihood import LikelihoodFit
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
    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.positions import Positions
    from reference_trainer.scenes import Scenes
    from reference_trainer.sensing import SensingBlocks

_FIRST_POWER_ROUNDS = 4
"""Rounds of expectation maximisation from the powers of a matched filter; one at each step after."""

_LEAST_POWER = 1e-6
"""Of the mean power received: a source without power stays where it is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Marginal:
    """The likelihood at given positions, with its slope and curvature at fixed powers.

    Attributes:
        cost: the negative log likelihood but for a constant, float64 ``[B]``.
        slope: float64 ``[B, 3 K]``, minus half the gradient of the cost, times the noise power.
        curvature: float64 ``[B, 3 K, 3 K]``, half the expected Gauss-Newton Hessian, times the same.
        power: of each source, float64 ``[B, K]``.
    """

    cost: Tensor
    slope: Tensor
    curvature: Tensor
    power: Tensor

    def where(self, wanted: Tensor, other: Marginal) -> Marginal:
        """Return this one for the scenes ``wanted`` (bool ``[B]``), and ``other`` elsewhere."""
        return Marginal(
            cost=torch.where(wanted, self.cost, other.cost),
            slope=torch.where(wanted[:, None], self.slope, other.slope),
            curvature=torch.where(wanted[:, None, None], self.curvature, other.curvature),
            power=torch.where(wanted[:, None], self.power, other.power),
        )


def refine_unconditional(
    physics: ScenePhysics,
    scenes: Scenes,
    start: Positions,
    *,
    iterations: int = 12,
    chunk: int = 32,
) -> LikelihoodFit:
    """Return the positions of the largest unconditional likelihood near ``start``, slot by slot.

    A last step after the conditional likelihood has found the sources, for i.i.d. symbols: their
    powers take as many numbers as sources, where the symbols take one for each snapshot too.

    Args:
        physics: geometry and symbol model.
        scenes: what was received and what the receiver knows; the truth is not read.
        start: a position for each source, in the main lobe around it.
        iterations: the most steps of the descent.
        chunk: scenes worked on together; memory and speed depend on it, results to rounding.

    Returns:
        the positions; ``misfit`` is the negative log of this likelihood, not of the conditional one.

    Raises:
        ValueError: the symbols are constant (one sample tells no power); the start has other scenes
            or an active source that is not finite; an option is out of range.

    Sync: once a step (whether any scene still moves). Memory: about 0.5 MB a scene of the chunk.
    """
    _require_random_symbols(physics)
    require_start(scenes, start)
    require_positive(iterations=iterations, chunk=chunk)
    start = start.to(scenes.snapshots.device)
    parameters, active = to_parameters(start), start.active
    misfit = parameters.new_empty(len(scenes))
    for rows, count in alike(start.num_sources, chunk):
        blocks = sensing_blocks(physics, scenes.select(rows))
        slots = rows.unsqueeze(-1), active_slots(active[rows], count)
        parameters[slots], misfit[rows] = _descend(physics, blocks, parameters[slots], iterations)
    return LikelihoodFit(positions=to_positions(parameters, active, scenes), misfit=misfit)


def _descend(
    physics: ScenePhysics, blocks: SensingBlocks, parameters: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """The parameters ``[B, K, 3]`` after some steps, each taken where it lowers the cost, and it."""
    if not parameters.shape[1]:
        return parameters, blocks.energy / blocks.noise_power
    region = tuple(edge.to(parameters.device) for edge in allowed_region(physics))
    parameters = parameters.clamp(*region)
    damping = torch.full_like(blocks.energy, FIRST_DAMPING)
    moving = torch.ones_like(damping, dtype=torch.bool)
    here = marginal_at(physics, blocks, parameters, power=None, rounds=_FIRST_POWER_ROUNDS)
    for _ in range(iterations):
        blocked = blocked_by(region, parameters, here.slope)
        step = damped_step(here.slope, here.curvature, damping, blocked)
        trial = (parameters + by_source(step)).clamp(*region)
        there = marginal_at(physics, blocks, trial, power=here.power)
        better = moving & (there.cost < here.cost)
        # A scene that has converged stands still, or it would depend on its neighbours in the batch.
        moving = moving & ((step * here.slope).sum(-1) > CONVERGED * blocks.noise_power)
        parameters = torch.where(better[:, None, None], trial, parameters)
        here = there.where(better, here)
        damping = next_damping(damping, better)
        if not bool(moving.any()):
            break
    return parameters, here.cost


def marginal_at(
    physics: ScenePhysics,
    blocks: SensingBlocks,
    parameters: Tensor,
    *,
    power: Tensor | None,
    rounds: int = 1,
) -> Marginal:
    """Return the likelihood at ``parameters`` ``[B, K, 3]``, after some rounds for the powers.

    Args:
        physics: geometry.
        blocks: the equations of the scenes.
        parameters: azimuth, elevation, 1 / range.
        power: to begin with, float64 ``[B, K]``; None takes those of a matched filter.
        rounds: of expectation maximisation; 0 keeps the powers.

    Sync: none on the CPU; on CUDA as ``torch.linalg.inv_ex``.
    """
    count = parameters.shape[1]
    columns = received_columns(physics, blocks, parameters).to(torch.complex128)
    conjugate = columns.conj()
    inner = conjugate @ columns.mT
    matched = (conjugate @ blocks.target.unsqueeze(-1)).squeeze(-1)
    gram, seen = inner[..., :count, :count], matched[..., :count]
    if power is None:
        power = _matched_power(gram, seen)
    noise = blocks.noise_power[:, None]
    symbols, mixing = _symbols(gram, seen, noise / power)
    for _ in range(rounds):
        spread = noise[:, None] * mixing.diagonal(dim1=-2, dim2=-1).real
        power = (_squared(symbols) + spread).mean(1).clamp_min(_LEAST_POWER)
        symbols, mixing = _symbols(gram, seen, noise / power)
    explained = (seen.conj() * symbols).real.sum(dim=(1, 2))
    # det(I + P G / sigma^2) is the product of the sources' p / sigma^2 over the determinant of W.
    spreads = (power / noise).log().sum(-1, keepdim=True) - torch.linalg.slogdet(mixing).logabsdet
    cost = (blocks.energy - explained) / blocks.noise_power + spreads.sum(dim=1)
    slope, curvature = _derivatives(inner, matched, symbols, mixing, blocks.noise_power)
    return Marginal(cost=cost, slope=slope, curvature=curvature, power=power)


def _matched_power(gram: Tensor, seen: Tensor) -> Tensor:
    """Mean power ``[B, K]`` of what a matched filter for each source alone gives."""
    gain = gram.diagonal(dim1=-2, dim2=-1).real
    return (_squared(seen) / gain.square()).mean(1).clamp_min(_LEAST_POWER)


def _symbols(gram: Tensor, seen: Tensor, loading: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``W b`` of the symbols ``[B, S, K]``, and W ``[B, S, K, K]``."""
    loaded = gram + torch.diag_embed(loading).unsqueeze(1)
    mixing: Tensor = torch.linalg.inv_ex(loaded).inverse
    return (mixing @ seen.unsqueeze(-1)).squeeze(-1), mixing


def _derivatives(
    inner: Tensor, matched: Tensor, symbols: Tensor, mixing: Tensor, noise_power: Tensor
) -> tuple[Tensor, Tensor]:
    """Slope and curvature: those of least squares, with second moments in place of known symbols."""
    count = symbols.shape[-1]
    cross = inner[..., :count, count:]
    unexplained = matched[..., count:] - (cross.mH @ symbols.unsqueeze(-1)).squeeze(-1)
    leaning = (cross.mH @ mixing).reshape(*symbols.shape[:-1], 3, count, count)
    leaning = leaning.diagonal(dim1=-2, dim2=-1).real.flatten(-2)
    slope = (symbols.repeat(1, 1, 3).conj() * unexplained).real.sum(dim=1)
    slope = slope - noise_power[:, None] * leaning.sum(dim=1)
    moments = symbols.conj().unsqueeze(-1) * symbols.unsqueeze(-2)
    moments = moments + noise_power[:, None, None, None] * mixing.conj()
    orthogonal = inner[..., count:, count:] - cross.mH @ (mixing @ cross)
    return slope, (moments.repeat(1, 1, 3, 3) * orthogonal).real.sum(dim=1)


def _squared(values: Tensor) -> Tensor:
    return torch.view_as_real(values).square().sum(-1)


def _require_random_symbols(physics: ScenePhysics) -> None:
    if physics.symbol_draws < 2:
        raise ValueError(
            f"refining positions by the unconditional likelihood: symbols are {physics.symbols!r}, "
            "one draw a scene, which tells no power; expected 'iid', or use refine alone"
        )

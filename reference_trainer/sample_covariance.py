"""A sample covariance that carries signal: powers of point sources, fitted to the snapshots.

The receiver sees 16 numbers of 144 at a time, so the covariance of the field on the RIS cannot be
averaged from the snapshots; it is fitted: ``R = sum_g p_g d_g d_g^H`` over a dictionary of steering
vectors d_g, with the powers p_g that explain what was received. Such an R is uncorrelated by
construction, also where one symbol for all snapshots makes the sources coherent: what to blend with
a network that predicts the covariance of uncorrelated sources.

Measurements of one scene: m numbers in each of l snapshots, ``z_l = Psi_l x_l + noise`` of power
``noise``. With i.i.d. symbols these are the snapshots as they came. With constant symbols all
snapshots share one field x, and 256 equations shrink to the N they are worth, in l = 1.

Source: the fixed point of sparse Bayesian learning and of SPICE for compressed covariance sensing
with a sensing matrix that changes from snapshot to snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from reference_trainer.covariance import principal_factor
from reference_trainer.geometry import steering_vectors
from reference_trainer.search_grid import place_bounds, places_from_sines, search_grid

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.scenes import Scenes
    from reference_trainer.search_grid import SearchGrid

OVERSAMPLING = 2.0
"""Points of the dictionary per resolution cell along each axis."""

COARSE_ATOMS, COARSE_ROUNDS = 128, 8
"""Atoms kept after one round with the whole dictionary, and rounds with these alone."""

FINE_SEEDS, FINE_ROUNDS = 24, 6
"""Strongest atoms that get neighbours half a step away, and rounds with those."""

_SMALLEST = 1e-12

_LEAST_NOISE = 1e-4
"""Of the mean power of a measurement; at 20 dB the noise is a hundredth."""

_RESCUING_NOISE = 3e-3
"""The same where the factorization fails all the same: above what rounding adds to 144 numbers."""


@dataclass(frozen=True, slots=True)
class Measured:
    """``z_l = Psi_l x_l + noise`` of B scenes: sensing ``[B, l, m, N]``, received ``[B, l, m]``."""

    sensing: Tensor
    received: Tensor
    noise: Tensor


@dataclass(frozen=True, slots=True)
class Atoms:
    """A atoms a scene: places ``[B, A, 3]`` (as in ``search_grid``) and powers ``[B, A]``."""

    places: Tensor
    power: Tensor

    def strongest(self, count: int) -> Atoms:
        """Return the ``count`` atoms of most power, or all if there are fewer. Sync: none."""
        power, index = self.power.topk(min(count, self.power.shape[1]), dim=1)
        return Atoms(self.places.gather(1, index.unsqueeze(-1).expand(-1, -1, 3)), power)


@torch.no_grad()
def fitted_factor(
    physics: ScenePhysics, scenes: Scenes, *, columns: int = 16, chunk_scenes: int = 8
) -> Tensor:
    """Return the factor of the fitted covariance, complex64 ``[B, N, columns]``, of trace N.

    Two stages: all atoms of a coarse dictionary once, which is a filter bank that knows the noise;
    then the strongest atoms alone, and at last their neighbours half a grid step away.

    Args:
        physics: geometry, field of view and the symbol model.
        scenes: what was received, the codes, the channel and the signal-to-noise ratio are read.
        columns: strongest eigenvectors of the fitted covariance to keep.
        chunk_scenes: scenes worked on together: a few on a CPU, where large blocks of memory are paid for
            at every turn; more on a GPU.

    Raises:
        ValueError: ``columns`` is below 1.

    Sync: waits for the device (Cholesky and eigenvalue routines). Memory: 5 MB a scene of a chunk.
    """
    if columns < 1:
        raise ValueError(f"fitting a covariance: columns is {columns}; expected at least 1")
    grid = search_grid(physics, oversampling=OVERSAMPLING, device=scenes.snapshots.device)
    parts = [
        _fitted(physics, grid, scenes.select(slice(start, start + chunk_scenes)), columns)
        for start in range(0, len(scenes), chunk_scenes)
    ]
    return torch.cat(parts)


def _fitted(physics: ScenePhysics, grid: SearchGrid, scenes: Scenes, columns: int) -> Tensor:
    measured = measurements(scenes, coherent=physics.symbols == "constant")
    atoms = _screened(grid, measured).strongest(COARSE_ATOMS)
    atoms, _ = refitted(physics, measured, atoms, COARSE_ROUNDS)
    atoms = _with_neighbours(physics, grid, atoms.strongest(FINE_SEEDS))
    atoms, vectors = refitted(physics, measured, atoms, FINE_ROUNDS)
    return principal_factor(vectors * atoms.power.sqrt()[:, None, :], columns=columns)


def measurements(scenes: Scenes, *, coherent: bool) -> Measured:
    """Return what was received of ``scenes``; ``coherent`` when one symbol serves all snapshots.

    Sync: none.
    """
    sensing = scenes.channel[:, None] * scenes.codes[:, :, None, :]
    noise = torch.pow(10.0, -scenes.snr_db / 10)
    if not coherent:
        return Measured(sensing, scenes.snapshots, noise)
    orthonormal, triangular = torch.linalg.qr(sensing.flatten(1, 2))
    received = (orthonormal.mH @ scenes.snapshots.flatten(1).unsqueeze(-1)).squeeze(-1)
    return Measured(triangular[:, None], received[:, None], noise)


def _screened(grid: SearchGrid, measured: Measured) -> Atoms:
    """All atoms of the grid, with the powers after one round that starts from equal ones.

    No product of sensing matrix and dictionary is formed: it would cost more than all later rounds.
    """
    sensing, vectors = measured.sensing, grid.vectors
    scenes, snapshots, numbers, elements = sensing.shape
    share = signal_power(measured) / len(grid)
    alike = vectors @ vectors.mH
    reflected = (sensing.reshape(-1, elements) @ alike).reshape(sensing.shape)
    filtered, whitened = _whitened(measured, share[:, None, None, None] * reflected, sensing)
    matched = (filtered.mH @ whitened.unsqueeze(-1)).squeeze(-1)
    seen = torch.view_as_real(matched @ vectors.conj()).square().sum(dim=(1, 3))
    rows = filtered.reshape(scenes, snapshots * numbers, elements)
    expected = _quadratic_forms(rows.mH @ rows, vectors)
    power = share[:, None] * seen / expected.clamp_min(_SMALLEST)
    return Atoms(grid.places.expand(scenes, -1, -1), power)


def signal_power(measured: Measured) -> Tensor:
    """Trace ``[B]`` of the covariance of the field that gives the mean power received."""
    received = torch.view_as_real(measured.received).square().sum(dim=(1, 2, 3))
    gain = torch.view_as_real(measured.sensing).square().sum(dim=(1, 2, 3, 4))
    numbers = measured.received[0].numel()
    clean = (received - measured.noise * numbers).clamp_min(1e-3 * numbers)
    return clean * measured.sensing.shape[-1] / gain


def _quadratic_forms(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``d^H M d`` of every column d of ``vectors`` ``[N, G]`` and every M ``[B, N, N]``: ``[B, G]``."""
    rows = matrix.reshape(-1, matrix.shape[-1]) @ vectors
    products = torch.view_as_real(rows.reshape(len(matrix), *vectors.shape))
    return (products * torch.view_as_real(vectors)).sum(dim=1).sum(-1)


def refitted(
    physics: ScenePhysics, measured: Measured, atoms: Atoms, rounds: int
) -> tuple[Atoms, Tensor]:
    """Return the atoms after some rounds of the fixed point, and their steering vectors ``[B, N, A]``.

    An atom without power never gets any. Sync: waits for the device (Cholesky).
    """
    azimuth, elevation, inverse_range = atoms.places.unbind(dim=-1)
    vectors = steering_vectors(physics, azimuth, elevation, 1 / inverse_range).mT
    sensing = measured.sensing
    seen = (sensing.flatten(1, 2) @ vectors).reshape(*sensing.shape[:3], -1)
    power = atoms.power
    for _ in range(rounds):
        power = power * power_ratio(measured, seen, power)
    return replace(atoms, power=power), vectors


def power_ratio(measured: Measured, seen: Tensor, power: Tensor) -> Tensor:
    """Power of each atom in the whitened measurements over what the fit expects of it, ``[B, A]``."""
    filtered, whitened = _whitened(measured, seen * power[:, None, None, :], seen)
    matched = whitened.unsqueeze(-2).conj() @ filtered  # a row: no adjoint of all atoms is made
    measured_power = torch.view_as_real(matched).square().sum(dim=(1, 2)).sum(-1)
    expected = torch.view_as_real(filtered).square().sum(dim=(1, 2)).sum(-1)
    return measured_power / expected.clamp_min(_SMALLEST)


def _whitened(measured: Measured, weighted: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` ``[B, l, m, c]`` and the measurements, after whitening by ``weighted rows^H + noise``."""
    covariance = weighted @ rows.mH
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    # Atoms that miss a strong source grow without limit: single precision would lose the noise.
    power = diagonal.real.mean(-1)
    diagonal.add_(torch.maximum(measured.noise[:, None], _LEAST_NOISE * power)[..., None])
    root, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed.any()):
        diagonal.add_(torch.where(failed > 0, _RESCUING_NOISE * power, 0.0)[..., None])
        root = torch.linalg.cholesky(covariance)
    both = torch.cat((rows, measured.received.unsqueeze(-1)), dim=-1)
    solved = torch.linalg.solve_triangular(root, both, upper=False)
    return solved[..., :-1], solved[..., -1]


def _with_neighbours(physics: ScenePhysics, grid: SearchGrid, atoms: Atoms) -> Atoms:
    """Each atom and six neighbours, half a step away along each axis, that share its power."""
    lowest, highest = (bound.to(atoms.places) for bound in place_bounds(physics))
    half_steps = torch.diag(torch.tensor(grid.steps, dtype=atoms.places.dtype) / 2)
    centre = torch.zeros_like(half_steps[:1])
    offsets = torch.cat((centre, half_steps, -half_steps)).to(atoms.places.device)
    sines = torch.cat((atoms.places[..., :2].sin(), atoms.places[..., 2:]), dim=-1)
    around = sines.unsqueeze(2) + offsets
    around[..., :2] = around[..., :2].clamp(-1, 1)
    places = torch.clamp(places_from_sines(around).flatten(1, 2), lowest, highest)
    power = (atoms.power / len(offsets)).repeat_interleave(len(offsets), dim=1)
    return Atoms(places, power)

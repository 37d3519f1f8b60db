"""What the receiver measures of a field on the RIS, and how that moves with the source.

A snapshot is ``y_l = Phi_l x_l + noise`` with the sensing matrix ``Phi_l = H diag(c_l)``. With
constant symbols the field is the same in all snapshots, and the ``L M`` equations form one block;
with a new symbol each snapshot they form L blocks of M equations. Estimators and bounds work on
blocks and need not know the symbol model.

The receiver's gain is unknown, so amplitudes mean nothing in absolute terms. But it makes the clean
snapshots of unit mean power, so the noise of a scene has the variance ``10 ** (-snr_db / 10)``.

Axes: B scenes, S blocks, R equations of a block, N RIS elements, K sources, P vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reference_trainer.geometry import element_positions_m, phasors

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.scenes import Scenes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SensingBlocks:
    """The equations of B scenes: ``target = matrix @ field + noise``, one field for each block.

    Attributes:
        matrix: complex ``[B, S, R, N]``.
        target: complex128 ``[B, S, R]``.
        energy: float64 ``[B]``, squared norm of the snapshots; at least that of the target, which
            may leave out directions that no field can reach.
        noise_power: float64 ``[B]``, noise variance of one complex equation.
        equations: complex equations in a scene before any were left out, ``L M``.
    """

    matrix: Tensor
    target: Tensor
    energy: Tensor
    noise_power: Tensor
    equations: int

    def __len__(self) -> int:
        return len(self.matrix)

    def select(self, index: Tensor | slice) -> SensingBlocks:
        """Return some of the scenes: a slice shares memory, an index tensor ``[n]`` copies."""
        return SensingBlocks(
            matrix=self.matrix[index],
            target=self.target[index],
            energy=self.energy[index],
            noise_power=self.noise_power[index],
            equations=self.equations,
        )


def noise_power(scenes: Scenes) -> Tensor:
    """Return the noise variance of one received sample, float64 ``[B]``. Sync: none."""
    return torch.pow(10.0, -scenes.snr_db.double() / 10)


def sensing_matrices(scenes: Scenes) -> Tensor:
    """Return ``Phi_l = H diag(c_l)``, complex ``[B, L, M, N]``, in the precision of the scenes."""
    return scenes.channel.unsqueeze(1) * scenes.codes.unsqueeze(2)


def sensing_blocks(
    physics: ScenePhysics, scenes: Scenes, *, compress: bool = True, double: bool = False
) -> SensingBlocks:
    """Return the equations of the scenes, split into blocks by the symbol model.

    Args:
        physics: says whether the symbols are constant.
        scenes: snapshots, codes, channels and signal-to-noise ratios are used, the truth is not.
        compress: with constant symbols, replace the ``L M`` equations by N equivalent ones: the
            residual of every field changes by one constant, which ``energy`` accounts for.
        double: keep the matrices in complex128; the default is the precision of the scenes.

    Sync: none on the CPU; compressing on CUDA as ``torch.linalg.cholesky``.
    """
    received = scenes.snapshots.to(torch.complex128)
    energy = torch.view_as_real(received).square().sum(dim=(1, 2, 3))
    matrix, target = sensing_matrices(scenes), received
    if double:
        matrix = scenes.channel.to(torch.complex128).unsqueeze(1) * scenes.codes.unsqueeze(2)
    if physics.symbols == "constant":
        matrix, target = matrix.flatten(1, 2).unsqueeze(1), received.flatten(1).unsqueeze(1)
        if compress and matrix.shape[2] > matrix.shape[3]:
            matrix, target = _compressed(scenes, received, matrix.dtype)
    return SensingBlocks(
        matrix=matrix,
        target=target,
        energy=energy,
        noise_power=noise_power(scenes),
        equations=received[0].numel(),
    )


def _compressed(scenes: Scenes, received: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``R x = z`` for ``Phi x = y``, with ``Phi^H Phi = R^H R`` and ``R^H z = Phi^H y``."""
    channel, codes = scenes.channel.to(torch.complex128), scenes.codes.to(torch.complex128)
    # Phi^H Phi = sum_l diag(c_l)^* H^H H diag(c_l): two thin products instead of one with L M rows.
    normal = (channel.mH @ channel) * (codes.mH @ codes)
    matched = ((received @ channel.conj()) * codes.conj()).sum(dim=1)
    lower = torch.linalg.cholesky(normal)
    target = torch.linalg.solve_triangular(lower, matched.unsqueeze(-1), upper=False)
    return lower.mH.resolve_conj().to(dtype).unsqueeze(1), target.mT


def sensed(blocks: SensingBlocks, vectors: Tensor) -> Tensor:
    """Return what is received of the fields ``vectors`` ``[B, P, N]``, complex ``[B, S, P, R]``.

    Computed in the precision of the matrices. Sync: none.
    """
    batch, count, rows, elements = blocks.matrix.shape
    flat = blocks.matrix.reshape(batch, count * rows, elements)
    received = vectors.to(flat.dtype) @ flat.mT
    return received.reshape(batch, -1, count, rows).transpose(1, 2)


def steering_derivatives(
    physics: ScenePhysics, azimuth_rad: Tensor, elevation_rad: Tensor, range_m: Tensor
) -> tuple[Tensor, Tensor]:
    """Return steering vectors ``[..., N]`` and their derivatives ``[..., 3, N]``, complex.

    The derivatives are with respect to azimuth and elevation, per radian, and range, per metre.
    The vectors are those of :func:`reference_trainer.geometry.steering_vectors`.

    Args:
        physics: geometry and wavelength.
        azimuth_rad: real ``[...]``; the precision of the result is that of this tensor.
        elevation_rad: real ``[...]``.
        range_m: real ``[...]``, above 0.

    Sync: none.
    """
    x_m, y_m = element_positions_m(physics, like=azimuth_rad)
    radius_m = range_m.unsqueeze(-1)
    sine, cosine = (f(azimuth_rad).unsqueeze(-1) for f in (torch.sin, torch.cos))
    upwards, level = (f(elevation_rad).unsqueeze(-1) for f in (torch.sin, torch.cos))
    along_m = (sine * level) * x_m + upwards * y_m
    excess = x_m * x_m + y_m * y_m - 2 * radius_m * along_m
    distance_m = (radius_m * radius_m + excess).sqrt()
    detour_m = excess / (distance_m + radius_m)
    slopes = torch.stack(
        (
            -radius_m * (cosine * level) * x_m,
            -radius_m * (level * y_m - (sine * upwards) * x_m),
            -(detour_m + along_m),
        ),
        dim=-2,
    )
    wavenumber = 2 * math.pi / physics.wavelength_m
    vectors = phasors(-wavenumber * detour_m, modulus=physics.elements**-0.5)
    turning = torch.complex(torch.zeros_like(slopes), -wavenumber * slopes)
    return vectors, turning * (vectors / distance_m).unsqueeze(-2)

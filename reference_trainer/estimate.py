"""What the receiver knows before it learns: the field on the RIS, estimated from the snapshots.

The receiver knows its channel, its codes and its noise level, and turns the snapshots into an
estimate of the field ``x`` on the RIS elements. That is the sample factor of the covariance (blended
into the loss) and, seen in beams, what tells the network about the sensing matrix.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from reference_trainer.beam_prior import fields_under_beams
from reference_trainer.channel import mean_power
from reference_trainer.sample_covariance import Measured

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.channel import ComplexArray, RealArray

BEAMS = 16
"""Beams along each axis of the beam map: the DFT of the RIS, zero-padded to this length."""


def estimate_field(
    snapshots: ComplexArray,
    codes: ComplexArray,
    channel: ComplexArray,
    snr_db: RealArray,
    *,
    coherent: bool,
) -> ComplexArray:
    """Return the estimated field on the RIS, ``[B, N, S]``, scaled to squared norm N.

    With coherent sources (one symbol each for all snapshots) all ``L M`` equations share one unknown
    field, S = 1, and its estimate is the linear minimum mean square error one for a white field: ridge
    regression. With a new symbol each snapshot there are S = L fields of M equations each, too few for
    a white prior; it is fitted to the scene instead: see ``beam_prior.py``.

    Args:
        snapshots: y, ``[B, L, M]``.
        codes: c, ``[B, L, N]``, of unit modulus.
        channel: H, ``[B, M, N]``; the sensing matrix of snapshot l is ``Phi_l = H diag(c_l)``.
        snr_db: float32 ``[B]``, clean over noise power of the snapshots.
        coherent: whether the symbols are constant over the snapshots.

    Source: the joint least squares of the published model, without the step that subtracts the mean
    over the snapshots (it removes coherent sources altogether).
    """
    if coherent:
        field = _shared_field(snapshots, codes, channel, _ridge(channel, snr_db))
    else:
        field = _field_per_snapshot(snapshots, codes, channel, snr_db)
    scale = np.sqrt(field.shape[-1] * mean_power(field))
    scaled: ComplexArray = field / np.maximum(scale, np.finfo(np.float32).tiny)[:, None, None]
    return scaled


def _ridge(channel: ComplexArray, snr_db: RealArray) -> RealArray:
    """Noise power over signal power per element, ``[B, 1]``.

    The clean power of a snapshot is the signal power of an element times the mean squared norm of
    a row of ``Phi_l``, which the codes do not change; the SNR compares just that with the noise.
    """
    noise_ratio = np.array([10 ** (-snr / 10) for snr in snr_db.tolist()], np.float32)
    ridge: RealArray = channel.shape[-1] * mean_power(channel) * noise_ratio
    return ridge[:, None]


def _shared_field(
    snapshots: ComplexArray, codes: ComplexArray, channel: ComplexArray, ridge: RealArray
) -> ComplexArray:
    matched = (np.matmul(snapshots, channel.conj()) * codes.conj()).sum(axis=1)
    # Phi^H Phi = sum_l diag(c_l)^* H^H H diag(c_l): two thin products instead of one with L M rows.
    normal = _gram(channel) * _gram(codes)
    return _solve_positive(normal, ridge, matched[:, :, None])


def _field_per_snapshot(
    snapshots: ComplexArray, codes: ComplexArray, channel: ComplexArray, snr_db: RealArray
) -> ComplexArray:
    sensing = channel[:, None] * codes[:, :, None, :]
    noise = np.power(10, -snr_db / 10, dtype=np.float32)
    measured = Measured(*map(torch.from_numpy, (sensing, snapshots, noise)))
    field: ComplexArray = fields_under_beams(measured).numpy()
    return field


def _gram(rows: ComplexArray) -> ComplexArray:
    """``R^H R`` of every matrix R.

    By torch, whose threads ``draw_scenes`` holds at one: for a product of this size the BLAS of
    NumPy starts threads of its own, which wait for each other 500 times longer than they work.
    """
    gram: ComplexArray = (torch.from_numpy(rows.conj()).mT @ torch.from_numpy(rows)).numpy()
    return gram


def _solve_positive(matrix: ComplexArray, ridge: RealArray, right: ComplexArray) -> ComplexArray:
    """Solve ``(matrix + ridge I) x = right`` for Hermitian matrices; torch has the batched solver."""
    loaded = torch.from_numpy(matrix)
    loaded.diagonal(dim1=-2, dim2=-1).add_(torch.from_numpy(ridge))
    factor = torch.linalg.cholesky(loaded)
    solution: ComplexArray = torch.cholesky_solve(torch.from_numpy(right), factor).numpy()
    return solution


def beam_map(estimate: Tensor) -> Tensor:
    """Return the estimated field as seen in 16x16 beams, float32 ``[B, 16, 16, 2]``, of unit RMS.

    The field on the elements goes through a two-dimensional DFT, zero-padded to 16x16: a source
    far away is a peak at its direction. Axes: vertical, horizontal, (re, im). With several columns
    the modulus is their root sum of squares in each beam, so that no source is lost, and the phase
    is that of their principal component.

    Args:
        estimate: complex64 ``[B, N, S]``, N a square of at most 16x16 elements; any device.

    Raises:
        ValueError: ``estimate`` is of another shape, or has no columns.

    Sync: none for S = 1; else as ``torch.linalg.eigh``.
    """
    side = math.isqrt(estimate.shape[1]) if estimate.ndim == 3 else 0
    if estimate.ndim != 3 or side**2 != estimate.shape[1] or side > BEAMS or not estimate.shape[2]:
        raise ValueError(
            f"beam_map got an estimate of shape {tuple(estimate.shape)}; expected [B, N, S] with N "
            "a square up to 256 and S at least 1; were the scenes drawn with estimate=False?"
        )
    field = estimate.mT.reshape(len(estimate), -1, side, side)
    beams = torch.fft.fft2(field, s=(BEAMS, BEAMS)).flatten(2)
    pixels = torch.view_as_real(_combined(beams)).reshape(-1, BEAMS, BEAMS, 2)
    mean_square = pixels.square().mean(dim=(1, 2, 3), keepdim=True)
    return pixels * mean_square.clamp_min(torch.finfo(pixels.dtype).tiny).rsqrt()


def _combined(beams: Tensor) -> Tensor:
    """One complex map ``[B, beams]`` from the maps ``[B, S, beams]`` of all columns."""
    if beams.shape[1] == 1:  # a single column is its own principal component
        return beams.squeeze(1)
    principal = torch.linalg.eigh(beams @ beams.mH).eigenvectors[..., -1:]
    phase = torch.sgn((principal.mH @ beams).squeeze(1))
    modulus: Tensor = torch.linalg.vector_norm(beams, dim=1)
    return modulus * phase

"""Covariances as factors: the 144x144 matrix R = F F^H is never built, only its factor F is kept.

Everything a loss or a feature needs follows from small Gram matrices: the eigenvalues of F F^H are
those of F^H F and zeros, ||F F^H|| = ||F^H F||, and a^H F F^H a = ||F^H a||^2.

Factors have shape [..., elements, columns]; "trace N" means ||F||^2 = trace(F F^H) = elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RANGE_SHARE = 0.1
"""Power of the range factor beside the angle factor in the predicted covariance."""

_SMALLEST_POWER = 1e-12


def unpack_complex(packed: Tensor, columns: int) -> Tensor:
    """Return the complex matrices of ``packed`` [..., 2 * rows * columns]: [..., rows, columns].

    The numbers are interleaved: entry i = row * columns + column is (packed[2i], packed[2i + 1]).
    float32 gives complex64, float64 gives complex128; half precision is widened to float32.

    Raises:
        ValueError: the last axis does not divide into rows of ``columns`` complex numbers.
    """
    if packed.shape[-1] % (2 * columns):
        raise ValueError(
            f"unpacking complex matrices with {columns} columns: got a last axis of "
            f"{packed.shape[-1]}, expected a multiple of {2 * columns} (re, im interleaved)"
        )
    wide = packed if packed.dtype == torch.float64 else packed.float()
    pairs = wide.reshape(*wide.shape[:-1], -1, columns, 2).contiguous()
    return torch.view_as_complex(pairs)


def pack_complex(matrix: Tensor) -> Tensor:
    """Return ``matrix`` [..., rows, columns] as real numbers; undoes :func:`unpack_complex`."""
    return torch.view_as_real(matrix).flatten(-3)


def squared_norm(matrix: Tensor) -> Tensor:
    """Return the squared Frobenius norm of each complex matrix, [...]: the trace of its F F^H."""
    return torch.view_as_real(matrix).square().sum(dim=(-3, -2, -1))


def scale_to_trace(factor: Tensor) -> Tensor:
    """Scale each factor so that the trace of its covariance is its number of elements."""
    # The squared norm is clamped, not the root: the gradient of sqrt at 0 would be infinite.
    gain = (factor.shape[-2] / squared_norm(factor).clamp_min(_SMALLEST_POWER)).sqrt()
    return factor * gain[..., None, None]


def joint_factor(angle_factor: Tensor, range_factor: Tensor) -> Tensor:
    """Return the predicted factor [..., elements, 10] of trace N.

    Its covariance is A A^H + RANGE_SHARE * A_r A_r^H, scaled to trace N.
    """
    columns = torch.cat([angle_factor, math.sqrt(RANGE_SHARE) * range_factor], dim=-1)
    return scale_to_trace(columns)


def blended_factor(factor: Tensor, sample: Tensor, blend: float) -> Tensor:
    """Return a factor of (1 - blend) F F^H + blend X X^H for the ``sample`` factor X.

    Raises:
        ValueError: ``blend`` is not in [0, 1).
    """
    if not 0.0 <= blend < 1.0:
        raise ValueError(
            f"blending the predicted with the sample covariance: got blend {blend}, expected a "
            "share of the sample covariance in [0, 1); 0 leaves the prediction alone"
        )
    if blend == 0.0:
        return factor
    return torch.cat([math.sqrt(1.0 - blend) * factor, math.sqrt(blend) * sample], dim=-1)


def gram(left: Tensor, right: Tensor) -> Tensor:
    """Return left^H right, [..., left columns, right columns]."""
    return left.mH @ right


def spectrum(factor: Tensor) -> Tensor:
    """Return the eigenvalues of F F^H that can differ from 0, largest first: [..., columns].

    The backward pass needs no division by eigenvalue gaps (only eigenvectors would), so ties and a
    rank below the number of columns are harmless. A factor with NaN or Inf gives NaN, as arithmetic
    would, where the eigenvalue routine alone raises an error.

    Sync: on CUDA the eigenvalue routine waits for the device (it checks for convergence).
    """
    matrix = gram(factor, factor)
    finite = torch.isfinite(torch.view_as_real(matrix)).all(dim=-1).all(dim=-1).all(dim=-1)
    solvable = torch.where(finite[..., None, None], matrix, torch.zeros_like(matrix))
    eigenvalues = torch.linalg.eigvalsh(solvable).flip(-1)
    return torch.where(finite[..., None], eigenvalues, torch.nan)


def load_weight(snr_db: Tensor) -> Tensor:
    """Return the weight w of the identity in the loaded covariance (1 - w) R + w I.

    w = 1e-3 * 10^(-snr_db / 20), within [1e-4, 5e-2]: more load where there is more noise.
    """
    return (1e-3 * torch.pow(10.0, -snr_db / 20.0)).clamp(1e-4, 5e-2)

"""Signal subspaces: the principal directions of a covariance, and what is left of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reference_trainer.factors import gram

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST_POWER = 1e-12
"""An eigenvalue below this share of the largest is rounding noise of single precision."""

_SMALLEST_REMAINDER = 1e-8


def signal_basis(factor: Tensor, num_sources: Tensor, *, width: int) -> Tensor:
    """Return the top ``num_sources`` eigenvectors of F F^H, complex128 ``[B, N, width]``.

    Column k is 0 where the scene has no more than k sources, or F no more than k directions: the
    span is the signal subspace all the same, and ``basis basis^H`` its projector.

    Args:
        factor: F, complex ``[B, N, n]``; the smaller of F^H F and F F^H is decomposed.
        num_sources: int64 ``[B]``.
        width: number of columns, at least the largest number of sources.

    Raises:
        ValueError: the factor has another shape, or holds NaN or Inf.

    Sync: waits for the device (the check, and the eigenvalue routine).
    """
    if factor.ndim != 3 or len(factor) != len(num_sources):
        raise ValueError(
            f"finding signal subspaces: got factors of shape {tuple(factor.shape)} and "
            f"{len(num_sources)} numbers of sources; expected [B, N, n] and [B]"
        )
    if not torch.isfinite(torch.view_as_real(factor)).all():
        raise ValueError("finding signal subspaces: a factor holds NaN or Inf; expected numbers")
    power, vectors = principal_directions(factor)
    power, vectors = power[:, :width], vectors[:, :, :width]
    column = torch.arange(power.shape[1], device=factor.device)
    kept = (column < num_sources[:, None]) & (power > _SMALLEST_POWER * power[:, :1])
    missing = width - power.shape[1]
    return torch.nn.functional.pad(vectors * kept[:, None, :], (0, missing))


def principal_directions(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of F F^H that can differ from 0, and their eigenvectors.

    Largest first, in double precision: ``[B, min(n, N)]`` and ``[B, N, min(n, N)]``. Eigenvectors
    of eigenvalues that are 0 mean nothing.

    Sync: as ``torch.linalg.eigh``.
    """
    wide = factor.to(torch.complex128)
    elements, columns = wide.shape[-2:]
    if columns > elements:
        power, vectors = torch.linalg.eigh(wide @ wide.mH)
        return power.flip(-1), vectors.flip(-1)
    power, mixing = torch.linalg.eigh(gram(wide, wide))
    power, mixing = power.flip(-1), mixing.flip(-1)
    scale = power.clamp_min(torch.finfo(power.dtype).tiny).rsqrt()
    return power, (wide @ mixing) * scale[..., None, :]


def deflation_weights(basis: Tensor, found: Tensor, dimensions: Tensor) -> Tensor:
    """Return weights ``[B, K + k, K]``: ``[U, Q] @ weights`` spans what is left of U outside Q.

    What is left are the ``dimensions`` strongest directions of the part of U that is orthogonal
    to Q, orthonormal, strongest first; the other columns are 0.

    Args:
        basis: U, ``[B, N, K]``, columns orthonormal or 0.
        found: Q, ``[B, N, k]``, columns orthonormal or 0.
        dimensions: int64 ``[B]``, most directions to keep.

    Sync: as ``torch.linalg.eigh``.
    """
    inside = gram(found, basis)
    power, mixing = torch.linalg.eigh(gram(basis, basis) - gram(inside, inside))
    power, mixing = power.flip(-1), mixing.flip(-1)
    column = torch.arange(power.shape[-1], device=basis.device)
    kept = (column < dimensions[:, None]) & (power > _SMALLEST_REMAINDER)
    scale = torch.where(kept, power.clamp_min(_SMALLEST_REMAINDER).rsqrt(), 0.0)
    mixing = mixing * scale[:, None, :]
    return torch.cat((mixing, -inside @ mixing), dim=1)


def extended(found: Tensor, vector: Tensor) -> Tensor:
    """Return the orthonormal columns Q ``[B, N, k]`` with one more for ``vector`` ``[B, N]``."""
    column = vector.unsqueeze(-1)
    for _ in range(2):  # once more: the first pass leaves rounding errors when little remains
        column = column - found @ gram(found, column)
        column = torch.nn.functional.normalize(column, dim=1)
    return torch.cat((found, column), dim=-1)

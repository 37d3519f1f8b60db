"""The hybrid covariance: a predicted one blended with a sampled one, and what its rank is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from reference_trainer.factors import blended_factor, gram, scale_to_trace, squared_norm
from reference_trainer.subspace import principal_directions, signal_basis

if TYPE_CHECKING:
    from torch import Tensor

HIGHEST_SHARE = 0.95
"""No schedule gives the sample covariance a larger share than this."""

COUNTED_ABOVE = 1e-6
"""An eigenvalue counts for the rank when it is above this share of the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendSchedule:
    """Share of the sample covariance in the hybrid, by epoch.

    It rises linearly from 0 to ``share`` over the first epochs, ``max(2, rise_fraction * epochs)``
    of them; after that it jitters, so that the network cannot rely on one share.

    Attributes:
        epochs: epochs planned.
        share: where it rises to.
        jitter: most it then differs from ``share``, either way, uniformly distributed.
        rise_fraction: part of the epochs in which it rises.
        seed: with the epoch, decides the jitter: a resumed run sees the same shares.

    Raises:
        ValueError: a field is out of its bounds; the message names it.
    """

    epochs: int
    share: float = 0.30
    jitter: float = 0.05
    rise_fraction: float = 0.20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"blend schedule: epochs is {self.epochs}; expected at least 1")
        limits = {"share": HIGHEST_SHARE, "jitter": 1.0, "rise_fraction": 1.0}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 0.0 <= value <= limit:
                raise ValueError(f"blend schedule: {name} is {value}; expected 0 to {limit}")

    def at(self, epoch: int) -> float:
        """Return the share in ``epoch``, counted from 0."""
        rising = max(2, math.ceil(self.rise_fraction * self.epochs - 1e-9))
        if epoch < rising:
            return self.share * epoch / rising
        if self.share == 0.0:  # no blend was asked for, so there is none to jitter
            return 0.0
        offset = np.random.default_rng((self.seed, epoch)).uniform(-self.jitter, self.jitter)
        return min(max(self.share + float(offset), 0.0), HIGHEST_SHARE)


def hybrid_factor(predicted: Tensor, sample: Tensor, *, share: float) -> Tensor:
    """Return a factor of ``(1 - share) R_pred + share R_samp``, both scaled to trace N.

    Args:
        predicted: factor of the predicted covariance, ``[..., N, n]``.
        sample: factor of the sample covariance, ``[..., N, s]``.
        share: in [0, 1).

    Raises:
        ValueError: ``share`` is not in [0, 1).
    """
    return blended_factor(scale_to_trace(predicted), scale_to_trace(sample), share)


def principal_factor(factor: Tensor, *, columns: int) -> Tensor:
    """Return the best factor with ``columns`` columns, complex64 ``[B, N, columns]``, of trace N.

    Its columns are the strongest eigenvectors of F F^H times the roots of their eigenvalues, 0
    where F has no more directions.

    Args:
        factor: F, complex ``[B, N, n]``.
        columns: number of columns, at least 1.

    Sync: as ``torch.linalg.eigh``.
    """
    power, vectors = principal_directions(factor)
    kept = vectors[..., :columns] * power[..., None, :columns].clamp_min(0.0).sqrt()
    padded = torch.nn.functional.pad(kept, (0, columns - kept.shape[-1]))
    return scale_to_trace(padded.to(torch.complex64))


def factor_of(covariance: Tensor) -> Tensor:
    """Return a square factor F of a dense covariance R = F F^H, complex ``[B, N, N]``.

    Args:
        covariance: complex ``[B, N, N]``; its Hermitian part is taken, negative eigenvalues as 0.

    Raises:
        ValueError: the matrices are not square.

    Sync: as ``torch.linalg.eigh``.
    """
    if covariance.ndim != 3 or covariance.shape[1] != covariance.shape[2]:
        raise ValueError(
            f"factoring covariances: got shape {tuple(covariance.shape)}; expected [B, N, N]"
        )
    power, vectors = torch.linalg.eigh((covariance + covariance.mH) / 2)
    factor: Tensor = vectors * power.clamp_min(0.0).sqrt()[:, None, :]
    return factor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankReport:
    """What the rank of each of B covariances is worth; all float64 ``[B]`` but the count.

    Attributes:
        count: eigenvalues above 1e-6 of the largest, int64: mere arithmetic, because blending adds
            the ranks of what is blended.
        entropy_rank: ``exp(-sum p log p)`` of the eigenvalues p, scaled to sum 1.
        participation_ratio: ``(sum l)^2 / sum l^2`` of the eigenvalues l.
        energy_in_top: share of the trace in the K strongest, K the number of sources.
        overlap: ``|U_K^H Q|^2 / K``: share of the true signal subspace in that of the covariance.
        chance: what the overlap would be for a random subspace, K / N.
    """

    count: Tensor
    entropy_rank: Tensor
    participation_ratio: Tensor
    energy_in_top: Tensor
    overlap: Tensor
    chance: Tensor


@torch.no_grad()
def rank_report(factor: Tensor, *, num_sources: Tensor, true_basis: Tensor) -> RankReport:
    """Return what the ranks of the covariances F F^H are worth.

    Args:
        factor: F, complex ``[B, N, n]``.
        num_sources: int64 ``[B]``, at least 1.
        true_basis: Q, ``[B, N, K]``, orthonormal basis of the true steering vectors, other columns 0.

    Sync: as ``torch.linalg.eigh``.
    """
    power = principal_directions(factor)[0].clamp_min(0.0)
    total = power.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
    share = power / total
    slot = torch.arange(power.shape[-1], device=power.device)
    top = share.where(slot < num_sources[:, None], 0.0).sum(dim=-1)
    basis = signal_basis(factor, num_sources, width=true_basis.shape[-1])
    overlap = squared_norm(gram(basis, true_basis.to(basis.dtype))) / num_sources
    return RankReport(
        count=(power > COUNTED_ABOVE * power[:, :1]).sum(dim=-1),
        entropy_rank=torch.special.entr(share).sum(dim=-1).exp(),
        participation_ratio=1 / share.square().sum(dim=-1),
        energy_in_top=top,
        overlap=overlap,
        chance=num_sources.double() / factor.shape[-2],
    )

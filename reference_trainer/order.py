"""How many sources there are, from the eigenvalues of a sample covariance alone.

The classical answer to compare a network with. It assumes that noise is white in the matrix whose
eigenvalues it is given, and sources not coherent: then all eigenvalues after the first K are equal
but for chance, and the criteria weigh how unequal they are against the parameters of another source.

Source: Wax and Kailath, 1985: minimum description length (MDL) and Akaike's criterion (AIC).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch

from reference_trainer.subspace import principal_directions

if TYPE_CHECKING:
    from torch import Tensor

Criterion = Literal["mdl", "aic"]

LOAD = 1e-3
"""Floor that counts best on fitted covariances of the published scenes, as a share of the trace."""

_FLOOR = 1e-12
"""Eigenvalues count as at least this share of the largest: the logarithm of 0 decides nothing."""


def order_criterion(
    eigenvalues: Tensor, *, snapshots: int, max_sources: int, criterion: Criterion = "mdl"
) -> Tensor:
    """Return the criterion of 0, 1, ... ``max_sources`` sources, float64 ``[..., max_sources + 1]``.

    ``T (p - k) log(am / gm) + penalty(k)``, with am and gm the arithmetic and geometric mean of the
    eigenvalues after the first k, and the penalty ``k (2p - k)`` times ``log(T) / 2`` (MDL) or 1
    (AIC). The smallest wins. Scaling all eigenvalues changes nothing.

    Args:
        eigenvalues: real ``[..., p]``, largest first.
        snapshots: T, number of outer products in the sample covariance.
        max_sources: largest number considered, below p.
        criterion: "mdl" or "aic".

    Raises:
        ValueError: an unknown criterion, too few eigenvalues, or no snapshots.

    Sync: none.
    """
    size = eigenvalues.shape[-1]
    if criterion not in get_args(Criterion):
        raise ValueError(f"counting sources: criterion is {criterion!r}; expected 'mdl' or 'aic'")
    if not 0 <= max_sources < size:
        raise ValueError(
            f"counting sources: at most {max_sources} among {size} eigenvalues; expected fewer "
            "sources than eigenvalues, because the rest are the noise they are compared with"
        )
    if snapshots < 1:
        raise ValueError(f"counting sources: snapshots is {snapshots}; expected at least 1")
    values = eigenvalues.to(torch.float64)
    floor = (_FLOOR * values[..., :1]).clamp_min(torch.finfo(torch.float64).tiny)
    values = torch.maximum(values, floor)
    count = torch.arange(max_sources + 1, dtype=torch.float64, device=values.device)
    equal = size - count
    mean = _tail_sums(values, max_sources) / equal
    log_ratio = mean.log() - _tail_sums(values.log(), max_sources) / equal
    price = 1.0 if criterion == "aic" else math.log(snapshots) / 2
    return snapshots * equal * log_ratio + price * count * (2 * size - count)


def count_sources(
    eigenvalues: Tensor,
    *,
    snapshots: int,
    max_sources: int,
    fewest: int = 1,
    criterion: Criterion = "mdl",
) -> Tensor:
    """Return the number of sources with the smallest criterion, int64 ``[...]``.

    Args:
        eigenvalues: real ``[..., p]``, largest first.
        snapshots: number of outer products in the sample covariance.
        max_sources: largest number considered, below p.
        fewest: smallest number considered.
        criterion: "mdl" or "aic".

    Raises:
        ValueError: as :func:`order_criterion`, or ``fewest`` is not in 0..``max_sources``.

    Sync: none.
    """
    if not 0 <= fewest <= max_sources:
        raise ValueError(f"counting sources: fewest is {fewest}; expected 0 to {max_sources}")
    values = order_criterion(
        eigenvalues, snapshots=snapshots, max_sources=max_sources, criterion=criterion
    )
    return values[..., fewest:].argmin(dim=-1) + fewest


def loaded_eigenvalues(factor: Tensor, *, load: float = LOAD) -> Tensor:
    """Return all N eigenvalues of ``R / trace(R) + load I``, R = F F^H, float64 ``[B, N]``.

    A fitted covariance has no noise floor, and a low rank whatever the scene: without a floor the
    criteria would count the directions of F and not the sources.

    Args:
        factor: F, complex ``[B, N, n]``.
        load: the floor, as a share of the trace.

    Raises:
        ValueError: ``load`` is not above 0.

    Sync: as ``torch.linalg.eigh``.
    """
    if not load > 0:
        raise ValueError(f"loading a spectrum: load is {load}; expected above 0")
    power = principal_directions(factor)[0].clamp_min(0.0)
    total = power.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
    missing = factor.shape[-2] - power.shape[-1]
    return torch.nn.functional.pad(power / total, (0, missing)) + load


def _tail_sums(values: Tensor, max_sources: int) -> Tensor:
    """Sums of all values after the first k, for k = 0..``max_sources``; small tails by themselves."""
    return values.flip(-1).cumsum(-1).flip(-1)[..., : max_sources + 1]

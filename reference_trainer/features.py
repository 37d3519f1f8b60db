"""Real features of a predicted covariance, for the heads that follow it.

All are computed from factors of trace N in single precision and are O(1), so that half precision
layers can take them; none is identically zero or constant over scenes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference_trainer.factors import load_weight, scale_to_trace, squared_norm

LAG_FEATURES = 574
SPECTRUM_FEATURES = 12
COUNT_FEATURES = 22

_SHARE_FLOOR = 1e-4


def lag_features(angle_factor: Tensor) -> Tensor:
    """Return 574 means of R = A A^H, scaled to trace N, over its diagonals: [..., 574] for N = 144.

    287 real means over the anti-diagonals i + j = k (their imaginary parts vanish, R is Hermitian),
    then the log of the power of A per element in the place of lag 0 (whose mean is 1 by the
    scaling), 143 real and 143 imaginary means over the diagonals i - j = 1..143.

    Source: with the zero-padded spectrum S_c of column c, anti-diagonal sums are the convolutions
    of A_c with conj(A_c), and diagonal sums its autocorrelations, the inverse transform of |S_c|^2.
    """
    elements = angle_factor.shape[-2]
    transform = torch.fft.fft(scale_to_trace(angle_factor), n=2 * elements, dim=-2)
    reversed_conjugate = transform.conj().flip(-2).roll(1, -2)  # transform of the conjugate
    anti_sums = torch.fft.ifft((transform * reversed_conjugate).sum(-1)).real
    lag_sums = torch.fft.ifft(torch.view_as_real(transform).square().sum(dim=(-2, -1)))
    anti = anti_sums[..., : 2 * elements - 1] / _anti_diagonal_lengths(anti_sums, elements)
    lag = lag_sums[..., 1:elements] / torch.arange(elements - 1, 0, -1, device=anti.device)
    log_power = torch.log(squared_norm(angle_factor).clamp_min(1e-12) / elements)
    return torch.cat([anti, log_power[..., None], lag.real, lag.imag], dim=-1)


def _anti_diagonal_lengths(like: Tensor, elements: int) -> Tensor:
    index = torch.arange(2 * elements - 1, device=like.device)
    return (elements - (index - (elements - 1)).abs()).to(like.dtype)


def spectrum_features(eigenvalues: Tensor) -> Tensor:
    """Return 12 features of eigenvalues [..., 10], largest first: [..., 12].

    The decadic logarithm of each one's share of the trace, then the entropy rank
    exp(-sum p log p) and the participation ratio 1 / sum p^2, both divided by 10.
    """
    share = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    share = share.clamp_min(0.0) + _SHARE_FLOOR  # keeps the slope of the logarithm finite
    entropy_rank = torch.special.entr(share).sum(-1, keepdim=True).exp()
    participation = share.square().sum(-1, keepdim=True).reciprocal()
    ranks = torch.cat([entropy_rank, participation], dim=-1) / eigenvalues.shape[-1]
    return torch.cat([torch.log10(share), ranks], dim=-1)


def count_features(
    eigenvalues: Tensor, snr_db: Tensor, *, elements: int, snapshots: int, max_sources: int
) -> Tensor:
    """Return 22 features that tell the number of sources (for ``max_sources`` = 5), [..., 22].

    From the spectrum of (1 - w) R + w I (w from :func:`load_weight`), whose ``elements`` eigenvalues
    are the given ones, largest first, and w itself for all others: per candidate K the gap
    l_K - l_{K+1}, the share of the trace in the first K, the decadic log of l_K / l_{K+1}, and the
    description length MDL(K); then l_1 and the smallest eigenvalue. Gaps and l_1 are in units of
    elements / max_sources, MDL in units of snapshots * elements, the smallest as log10(l_N) + 3.

    Source: MDL(K) = T (N - K) log(am / gm) + K (2N - K) / 2 log T, with am and gm the arithmetic
    and geometric mean of l_{K+1}..l_N (Wax and Kailath, 1985).
    """
    weight = load_weight(snr_db)[..., None]
    loaded = (1.0 - weight) * eigenvalues.clamp_min(0.0) + weight
    head, following = loaded[..., :max_sources], loaded[..., 1 : max_sources + 1]
    unit = elements / max_sources
    return torch.cat(
        [
            (head - following) / unit,
            head.cumsum(-1) / elements,
            torch.log10(head / following),
            _description_lengths(loaded, weight, elements, snapshots, max_sources),
            head[..., :1] / unit,
            torch.log10(weight) + 3.0,
        ],
        dim=-1,
    )


def _description_lengths(
    loaded: Tensor, weight: Tensor, elements: int, snapshots: int, max_sources: int
) -> Tensor:
    """MDL(1..max_sources) / (snapshots * elements) of the spectrum ``loaded`` and N - n times w."""
    equal = elements - loaded.shape[-1]
    count = torch.arange(1, max_sources + 1, device=loaded.device, dtype=loaded.dtype)
    tail = elements - count
    tail_sum = _sums_after(loaded, max_sources) + equal * weight
    log_sum = _sums_after(loaded.log(), max_sources) + equal * weight.log()
    log_ratio = torch.log(tail_sum / tail) - log_sum / tail
    penalty = count * (2 * elements - count) / 2 * math.log(snapshots)
    return (tail * log_ratio + penalty / snapshots) / elements


def _sums_after(values: Tensor, count: int) -> Tensor:
    """Sum of all values after the first k, for k = 1..count; small tails are summed by themselves."""
    return values.flip(-1).cumsum(-1).flip(-1)[..., 1 : count + 1]

"""Fields of single snapshots, estimated under beam powers that all snapshots of a scene share.

With a new symbol each snapshot, M numbers have to tell the N of a field: a white prior leaves nine tenths
of the energy where no source is. The sources stand still, though: their directions are the same in all
snapshots. So the powers of a grid of beams are fitted to all snapshots together first, and each field is
then estimated with these as its prior.

Source: a few rounds of the fixed point of ``sample_covariance``, with beams of the far field (the DFT of
the RIS) in place of steering vectors. Its ratio enters squared, which needs half as many rounds.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from reference_trainer.sample_covariance import Measured, power_ratio, signal_power

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 3

BEAMS_ALONG_AXIS = 16
HIGHEST_BEAM = 5
"""Vertical beams reach to 5 of 8 steps, a sine of 0.63; sources lie within 30 degrees of elevation."""


@lru_cache(maxsize=4)
def beam_vectors(side: int) -> Tensor:
    """Return plane waves on a RIS of ``side`` elements a side as columns, complex64 ``[side^2, G]``."""
    angle = 2 * math.pi / BEAMS_ALONG_AXIS * torch.arange(side, dtype=torch.float64)
    across = torch.arange(BEAMS_ALONG_AXIS)
    upward = torch.arange(-HIGHEST_BEAM, HIGHEST_BEAM + 1)
    horizontal, vertical = (
        torch.exp(1j * torch.outer(angle, steps.double())) for steps in (across, upward)
    )
    return torch.kron(vertical, horizontal).to(torch.complex64)


def beam_powers(measured: Measured, *, rounds: int = ROUNDS) -> Tensor:
    """Return the power of each beam of :func:`beam_vectors` that explains all snapshots, ``[B, G]``.

    Args:
        measured: what was received; N is a square.
        rounds: of the fixed point, from equal powers.

    Sync: waits for the device (Cholesky).
    """
    return _powers(measured, _seen_beams(measured), rounds)


def fields_under_beams(measured: Measured) -> Tensor:
    """Return the field of every snapshot, complex64 ``[B, N, L]``: its mean given what was received.

    Each is linear minimum mean square error under the prior ``F diag(p) F^H``, with F the beams and p
    their powers.

    Args:
        measured: as for :func:`beam_powers`.

    Sync: waits for the device (Cholesky).
    """
    seen = _seen_beams(measured)
    power = _powers(measured, seen, ROUNDS)
    weighted = seen * power[:, None, None, :]
    covariance = weighted @ seen.mH
    covariance.diagonal(dim1=-2, dim2=-1).add_(measured.noise[:, None, None])
    whitened = torch.cholesky_solve(
        measured.received.unsqueeze(-1), torch.linalg.cholesky(covariance)
    )
    amplitudes = (weighted.mH @ whitened).squeeze(-1)
    fields: Tensor = _beams_of(measured) @ amplitudes.mT
    return fields


def _beams_of(measured: Measured) -> Tensor:
    return beam_vectors(math.isqrt(measured.sensing.shape[-1])).to(measured.sensing.device)


def _seen_beams(measured: Measured) -> Tensor:
    """Every beam as each snapshot sees it, ``[B, L, M, G]``."""
    beams = _beams_of(measured)
    rows = measured.sensing.reshape(-1, beams.shape[0]) @ beams
    return rows.reshape(*measured.sensing.shape[:3], -1)


def _powers(measured: Measured, seen: Tensor, rounds: int) -> Tensor:
    elements, beams = measured.sensing.shape[-1], seen.shape[-1]
    power = (signal_power(measured) / (elements * beams))[:, None].expand(-1, beams)
    for _ in range(rounds):
        power = power * power_ratio(measured, seen, power).square()
    return power

"""The channel from the sources over the RIS to the base station, for a batch of scenes.

NumPy and not torch, on purpose: NumPy works element by element in one thread, and calls BLAS once
per scene at one fixed shape (too small for BLAS to split among threads), so the bits of a scene
depend neither on its neighbours in the batch nor on the number of threads.

Axes: B scenes, L snapshots, M antennas, N RIS elements, S symbol draws (1 or L).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    ComplexArray = NDArray[np.complex64]
    RealArray = NDArray[np.float32]


def phase_codes(levels: NDArray[np.uint8], *, code_bits: int) -> ComplexArray:
    """Return the unit-modulus reflection coefficients of quantised phases, of the same shape.

    Args:
        levels: integers below ``2 ** code_bits``; level q is the phase ``2 pi q / 2 ** code_bits``.
        code_bits: resolution of the phase shifters.
    """
    count = 2**code_bits
    phase_rad = np.arange(count) * (2 * math.pi / count)
    return np.take(np.exp(1j * phase_rad).astype(np.complex64), levels)


def rician_channel(
    *,
    station_response: ComplexArray,
    ris_response: ComplexArray,
    scatter: ComplexArray,
    rician_factor: RealArray,
) -> ComplexArray:
    """Return the channel ``[B, M, N]`` from the RIS to the base station, unit mean power an entry.

    ``H = sqrt(f / (f + 1)) b a^T + sqrt(1 / (f + 1)) W``: every entry of the line of sight has
    modulus 1, so the factor f really is the power ratio of the two parts. The response a enters
    without a conjugate, because the delays on either side of the RIS add up.

    Args:
        station_response: ``[B, M]``, entries of modulus 1.
        ris_response: ``[B, N]``, entries of modulus 1.
        scatter: W, ``[B, M, N]``, entries CN(0, 1).
        rician_factor: f, ``[B]``, linear.
    """
    direct = np.sqrt(rician_factor / (rician_factor + 1))
    scattered = np.sqrt(1 / (rician_factor + 1))
    channel = scatter * scattered[:, None, None]
    channel += (station_response * direct[:, None])[:, :, None] * ris_response[:, None, :]
    return channel


def received(channel: ComplexArray, codes: ComplexArray, signal: ComplexArray) -> ComplexArray:
    """Return the clean snapshots ``y_l = H diag(c_l) x_l``, ``[B, L, M]``.

    Args:
        channel: H, ``[B, M, N]``.
        codes: c, ``[B, L, N]``.
        signal: x, the field on the RIS, ``[B, S, N]`` with S = 1 (the same x_l for all l) or L.
    """
    reflected: ComplexArray = np.matmul(codes * signal, channel.transpose(0, 2, 1))
    return reflected


def mean_power(samples: ComplexArray) -> RealArray:
    """Return the mean squared modulus of each scene's samples ``[B, ...]``, ``[B]``."""
    rows = np.ascontiguousarray(samples).view(np.float32).reshape(len(samples), 1, -1)
    squares: RealArray = np.matmul(rows, rows.transpose(0, 2, 1))[:, 0, 0]
    return squares / np.float32(rows.shape[-1] // 2)

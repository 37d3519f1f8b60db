"""From random numbers to snapshots: where the sources stand, what they send, what arrives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reference_trainer.channel import mean_power, phase_codes, received, rician_channel
from reference_trainer.geometry import phasors, steering_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from reference_trainer.channel import ComplexArray
    from reference_trainer.physics import ScenePhysics
    from reference_trainer.variates import Variates


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the sources of B scenes stand, sorted by azimuth, inactive slots last and zero.

    Attributes:
        count: int64 ``[B]``.
        active: bool ``[B, K]``.
        azimuth_rad: float32 ``[B, K]``.
        elevation_rad: float32 ``[B, K]``.
        range_m: float32 ``[B, K]``.
    """

    count: NDArray[np.int64]
    active: NDArray[np.bool_]
    azimuth_rad: NDArray[np.float32]
    elevation_rad: NDArray[np.float32]
    range_m: NDArray[np.float32]


def place_sources(physics: ScenePhysics, variates: Variates) -> Sources:
    """Return the sources of each scene: how many, and where."""
    slots = physics.max_sources
    count = 1 + np.floor(variates.scene[:, 0] * physics.drawn_sources).astype(np.int64)
    active = np.arange(slots) < count[:, None]
    azimuth_half = math.radians(physics.azimuth_half_width_deg)
    elevation_half = math.radians(physics.elevation_half_width_deg)
    azimuth = _uniform(variates.source[:, 0], -azimuth_half, azimuth_half)
    elevation = _uniform(variates.source[:, 1], -elevation_half, elevation_half)
    range_m = _uniform(variates.source[:, 2], physics.min_range_m, physics.max_range_m)
    order = np.argsort(np.where(active, azimuth, np.inf), axis=1, kind="stable")

    def slotted(values: NDArray[np.float64]) -> NDArray[np.float32]:
        ordered = np.take_along_axis(values, order, axis=1)
        return np.where(active, ordered, 0.0).astype(np.float32)

    return Sources(count, active, slotted(azimuth), slotted(elevation), slotted(range_m))


def synthesise(physics: ScenePhysics, variates: Variates) -> dict[str, NDArray[Any]]:
    """Return all arrays of ``Scenes`` but the estimate, by name."""
    sources = place_sources(physics, variates)
    snr_db = _uniform(variates.scene[:, 1], physics.min_snr_db, physics.max_snr_db)
    steering = _steering(physics, sources, variates)
    signal, power = _signal(physics, sources, variates.symbols, steering)
    codes = phase_codes(variates.levels, code_bits=physics.code_bits)
    channel = _channel(physics, variates)
    clean = received(channel, codes, signal)
    return {
        "snapshots": _amplified(clean, variates.noise, snr_db),
        "codes": codes,
        "channel": channel,
        "snr_db": snr_db.astype(np.float32),
        "num_sources": sources.count,
        "azimuth_rad": sources.azimuth_rad,
        "elevation_rad": sources.elevation_rad,
        "range_m": sources.range_m,
        "active": sources.active,
        "true_factor": _factor(physics, steering, power),
        "true_basis": _basis(steering, sources),
    }


def _uniform(unit: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * unit


def _steering(physics: ScenePhysics, sources: Sources, variates: Variates) -> ComplexArray:
    """Steering vectors ``[B, K, N]``, zero for inactive slots."""
    position = (sources.azimuth_rad, sources.elevation_rad, _positive_range_m(sources))
    offsets_m = element_offsets_m(physics, variates)
    if offsets_m is not None:
        offsets_m = offsets_m[0].unsqueeze(1), offsets_m[1].unsqueeze(1)
    vectors = steering_vectors(
        physics, *(torch.from_numpy(part) for part in position), offsets_m=offsets_m
    )
    masked: ComplexArray = vectors.numpy() * sources.active[:, :, None]
    return masked


def element_offsets_m(physics: ScenePhysics, variates: Variates) -> tuple[Tensor, Tensor] | None:
    """Return how far the elements of each scene are displaced along x and y, ``[B, N]`` each."""
    if variates.jitter is None:
        return None
    most_m = np.float32(physics.element_jitter * physics.wavelength_m / 2)
    along_x, along_y = torch.from_numpy(variates.jitter * most_m).unbind(dim=1)
    return along_x, along_y


def _positive_range_m(sources: Sources) -> NDArray[np.float32]:
    """Ranges with the padding replaced by 1 m, so that inactive slots stay finite."""
    return np.where(sources.active, sources.range_m, np.float32(1))


def _signal(
    physics: ScenePhysics, sources: Sources, symbols: ComplexArray, steering: ComplexArray
) -> tuple[ComplexArray, NDArray[np.float32]]:
    """The field ``[B, S, N]`` on the RIS, and the power ``[B, K]`` of each source in it.

    Free space: amplitudes fall as 1 / range. What all sources share (transmit power, wavelength
    over 4 pi) is left out, because the receiver's gain divides by it.
    """
    amplitude = np.where(sources.active, 1 / _positive_range_m(sources), np.float32(0))
    weighted = symbols[:, : physics.symbol_draws] * amplitude[:, None, :]
    field: ComplexArray = np.matmul(weighted, steering)
    # Of one constant symbol the realised power is the power; of many, it is the expected one.
    coherent = physics.symbols == "constant"
    envelope = weighted[:, 0] if coherent else amplitude.astype(np.complex64)
    return field, envelope.real**2 + envelope.imag**2


def _channel(physics: ScenePhysics, variates: Variates) -> ComplexArray:
    half = math.radians(physics.station_half_width_deg)
    departure, arrival = (
        torch.from_numpy(_uniform(variates.scene[:, columns], -half, half).astype(np.float32))
        for columns in (slice(3, 5), slice(5, 7))
    )
    factor = _uniform(
        variates.scene[:, 2], physics.min_rician_factor, physics.max_rician_factor
    ).astype(np.float32)
    distance_m = torch.full_like(departure[:, 0], physics.station_range_m)
    towards_station = steering_vectors(
        physics,
        departure[:, 0],
        departure[:, 1],
        distance_m,
        offsets_m=element_offsets_m(physics, variates),
    )
    unit_norm: ComplexArray = towards_station.numpy()
    return rician_channel(
        station_response=_station_response(physics, arrival).numpy(),
        ris_response=unit_norm * np.float32(physics.side_elements),
        scatter=variates.scatter,
        rician_factor=factor,
    )


def _station_response(physics: ScenePhysics, arrival_rad: Tensor) -> Tensor:
    """Plane-wave response ``[B, M]`` of the station's half-wavelength array, entries of modulus 1."""
    azimuth, elevation = phasors(arrival_rad).unbind(dim=1)
    offsets = torch.arange(physics.antennas, dtype=arrival_rad.dtype) - (physics.antennas - 1) / 2
    direction = (azimuth.imag * elevation.real).unsqueeze(-1)
    return phasors(math.pi * direction * offsets)


def _amplified(
    clean: ComplexArray, noise: ComplexArray, snr_db: NDArray[np.float64]
) -> ComplexArray:
    """Snapshots whose clean part has unit mean power, with noise of unit power at the given SNR."""
    gain = 1 / np.sqrt(mean_power(clean))
    level = np.array([10 ** (-snr / 20) for snr in snr_db.tolist()], np.float32)
    return clean * gain[:, None, None] + noise * level[:, None, None]


def _factor(
    physics: ScenePhysics, steering: ComplexArray, power: NDArray[np.float32]
) -> ComplexArray:
    """The true factor ``[B, N, K]``: columns with the powers folded in, squared norm N."""
    share = power / power.sum(axis=1, keepdims=True)
    columns = steering * np.sqrt(physics.elements * share)[:, :, None]
    return np.ascontiguousarray(columns.transpose(0, 2, 1))


def _basis(steering: ComplexArray, sources: Sources) -> ComplexArray:
    """Orthonormal basis ``[B, N, K]`` of the active steering vectors, inactive columns zero.

    Inactive slots come last, so the first columns of Q span the active ones alone.
    """
    basis = torch.linalg.qr(torch.from_numpy(steering).mT).Q.contiguous().numpy()
    masked: ComplexArray = basis * sources.active[:, None, :]
    return masked

"""The channel, the codes and the snapshots against plain sums, and their statistics."""

from __future__ import annotations

import numpy as np
import pytest

from reference_trainer.channel import mean_power, phase_codes, received, rician_channel


def gaussian(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """CN(0, 1) entries, complex64."""
    parts = generator.standard_normal((*shape, 2), dtype=np.float32) * np.float32(0.5**0.5)
    return parts.view(np.complex64)[..., 0]


def modulus_one(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Random phases, complex64."""
    return np.exp(2j * np.pi * generator.random(shape)).astype(np.complex64)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_codes_are_evenly_spaced_phases(bits: int) -> None:
    """Level q of b bits is the phase 2 pi q / 2^b, of modulus 1."""
    levels = np.arange(2**bits, dtype=np.uint8)
    codes = phase_codes(levels, code_bits=bits)
    assert codes.dtype == np.complex64
    np.testing.assert_allclose(np.abs(codes), 1, atol=1e-7)
    np.testing.assert_allclose(codes ** (2**bits), 1, atol=1e-4)
    np.testing.assert_allclose(codes * codes[-1], np.roll(codes, 1), atol=1e-6)


def test_snapshots_are_the_plain_sum_over_elements() -> None:
    """y_lm = sum_n H_mn c_ln x_n, for one field and for one field a snapshot."""
    generator = np.random.default_rng(1)
    channel, codes = gaussian(generator, 3, 4, 9), modulus_one(generator, 3, 5, 9)
    for draws in (1, 5):
        signal = gaussian(generator, 3, draws, 9)
        expected = np.zeros((3, 5, 4), np.complex128)
        for scene, snapshot, antenna in np.ndindex(3, 5, 4):
            for element in range(9):
                expected[scene, snapshot, antenna] += (
                    complex(channel[scene, antenna, element])
                    * complex(codes[scene, snapshot, element])
                    * complex(signal[scene, snapshot % draws, element])
                )
        np.testing.assert_allclose(received(channel, codes, signal), expected, rtol=0, atol=1e-5)


def test_line_of_sight_and_scattering_are_the_limits() -> None:
    """A huge Rician factor leaves the outer product of the responses, a tiny one the scattering."""
    generator = np.random.default_rng(2)
    station, ris = modulus_one(generator, 2, 4), modulus_one(generator, 2, 9)
    scatter = gaussian(generator, 2, 4, 9)

    def channel(factor: float) -> np.ndarray:
        return rician_channel(
            station_response=station,
            ris_response=ris,
            scatter=scatter,
            rician_factor=np.full(2, factor, np.float32),
        )

    direct = np.einsum("bm,bn->bmn", station, ris)
    np.testing.assert_allclose(channel(1e12), direct, rtol=0, atol=1e-5)
    np.testing.assert_allclose(channel(1e-12), scatter, rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [0.5, 3.0, 10.0])
def test_the_rician_factor_is_a_ratio_of_powers(factor: float) -> None:
    """Entries have unit power, and the line of sight has the factor times the scattered power."""
    generator = np.random.default_rng(3)
    station, ris = modulus_one(generator, 40, 16), modulus_one(generator, 40, 144)
    channel = rician_channel(
        station_response=station,
        ris_response=ris,
        scatter=gaussian(generator, 40, 16, 144),
        rician_factor=np.full(40, factor, np.float32),
    )
    direct = np.einsum("bmn,bm,bn->b", channel, station.conj(), ris.conj()) / (16 * 144)
    direct_power = float(np.mean(np.abs(direct) ** 2))
    # 92,160 independent entries: one standard error of a power is a third of a per cent.
    assert float(mean_power(channel).mean()) == pytest.approx(1, abs=0.015)
    assert direct_power == pytest.approx(factor / (factor + 1), abs=0.015)


def test_mean_power_counts_both_components() -> None:
    """The power is the mean of |z|^2 over all samples of a scene, whatever their layout."""
    samples = gaussian(np.random.default_rng(4), 3, 5, 7)
    expected = np.mean(np.abs(samples.astype(np.complex128)) ** 2, axis=(1, 2))
    np.testing.assert_allclose(mean_power(samples), expected, rtol=1e-6)
    np.testing.assert_allclose(mean_power(samples.transpose(0, 2, 1)), expected, rtol=1e-6)

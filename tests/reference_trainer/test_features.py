"""Features agree with slow dense computations, and none of them is dead."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference_trainer.factors import joint_factor, scale_to_trace, spectrum
from reference_trainer.features import (
    COUNT_FEATURES,
    LAG_FEATURES,
    SPECTRUM_FEATURES,
    count_features,
    lag_features,
    spectrum_features,
)
from tests.reference_trainer.scene_batches import complex_noise

seeds = st.integers(0, 2**31)
NETWORK_SIZES = {"elements": 144, "snapshots": 16, "max_sources": 5}


def slow_lag_features(factor: Tensor) -> list[float]:
    """Loop over the dense covariance of one factor."""
    elements = len(factor)
    power = float((factor.abs() ** 2).sum())
    dense = (factor @ factor.mH) * (elements / power)
    pairs = [(i, j) for i in range(elements) for j in range(elements)]

    def mean(of: list[complex]) -> complex:
        return sum(of) / len(of)

    anti = [
        mean([dense[i, j].item() for i, j in pairs if i + j == k]).real
        for k in range(2 * elements - 1)
    ]
    lag = [mean([dense[i, j].item() for i, j in pairs if i - j == k]) for k in range(1, elements)]
    return [*anti, math.log(power / elements), *(x.real for x in lag), *(x.imag for x in lag)]


@given(seeds, st.integers(2, 7), st.integers(1, 4), st.floats(0.01, 100.0))
def test_lag_features_are_the_means_over_diagonals(seed, elements, columns, size):
    """The transform gives what loops over the dense covariance give."""
    factor = size * complex_noise(2, elements, columns, seed=seed)
    slow = torch.tensor([slow_lag_features(one) for one in factor], dtype=torch.float64)
    torch.testing.assert_close(lag_features(factor), slow)


def test_spectrum_features_of_known_spectra():
    """Equal eigenvalues have full rank by both measures, a single one rank 1."""
    equal, single = torch.full((10,), 14.4), torch.eye(10)[0] * 144
    features = spectrum_features(torch.stack([equal, single]))
    torch.testing.assert_close(features[0, :10], torch.full((10,), -1.0), atol=1e-3, rtol=0)
    assert features[1, :2].tolist() == pytest.approx([0.0, -4.0], abs=1e-3)
    assert features[:, 10].tolist() == pytest.approx([1.0, 0.1], abs=2e-3)
    assert features[:, 11].tolist() == pytest.approx([1.0, 0.1], abs=2e-3)


def slow_count_features(factor: Tensor, snr_db: float) -> list[float]:
    """From the 144 eigenvalues of the dense loaded covariance of one factor."""
    elements, snapshots = 144, 16
    weight = min(max(1e-3 * 10 ** (-snr_db / 20), 1e-4), 5e-2)
    dense = (1 - weight) * (factor @ factor.mH) + weight * torch.eye(elements)
    values = torch.linalg.eigvalsh(dense).flip(-1).tolist()

    def description_length(k: int) -> float:
        tail = values[k:]
        arithmetic = math.log(sum(tail) / len(tail))
        geometric = sum(map(math.log, tail)) / len(tail)
        penalty = k * (2 * elements - k) / 2 * math.log(snapshots)
        length = snapshots * len(tail) * (arithmetic - geometric) + penalty
        return length / (snapshots * elements)

    return [
        *((values[k] - values[k + 1]) * 5 / elements for k in range(5)),
        *(sum(values[: k + 1]) / elements for k in range(5)),
        *(math.log10(values[k] / values[k + 1]) for k in range(5)),
        *(description_length(k) for k in range(1, 6)),
        values[0] * 5 / elements,
        math.log10(values[-1]) + 3,
    ]


@given(seeds, st.integers(1, 10), st.floats(-5.0, 20.0))
def test_count_features_are_those_of_the_dense_spectrum(seed, rank, snr_db):
    """The closed form for the 134 equal eigenvalues agrees with all 144, at any rank."""
    factor = complex_noise(1, 144, rank, seed=seed) @ complex_noise(1, rank, 10, seed=seed + 1)
    factor = scale_to_trace(factor)
    fast = count_features(spectrum(factor), torch.tensor([snr_db]).double(), **NETWORK_SIZES)
    slow = torch.tensor([slow_count_features(factor[0], snr_db)], dtype=torch.float64)
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)


def all_features(scenes: int) -> Tensor:
    """Features of random factors of random rank and power, in single precision."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, scenes, 144, 5, generator=generator, dtype=torch.complex64)
    columns = torch.rand(2, scenes, 1, 5, generator=generator).square()
    angle, ranged = noise * columns
    eigenvalues = spectrum(joint_factor(angle, ranged))
    snr_db = 25 * torch.rand(scenes, generator=generator) - 5
    counts = count_features(eigenvalues, snr_db, **NETWORK_SIZES)
    return torch.cat([lag_features(angle), spectrum_features(eigenvalues), counts], dim=-1)


def test_no_feature_is_zero_or_constant():
    """Every one of the 608 features differs between scenes by more than rounding."""
    features = all_features(scenes=64)
    assert features.shape[-1] == LAG_FEATURES + SPECTRUM_FEATURES + COUNT_FEATURES
    assert features.std(dim=0).min() > 1e-3


def test_features_fit_half_precision():
    """All features are of the order of 1, far from the largest half precision number."""
    assert all_features(scenes=64).abs().max() < 30


def test_features_of_a_collapsed_prediction_have_finite_gradients():
    """A covariance of rank one, with nine zero eigenvalues, still gives a usable gradient."""
    angle = torch.zeros(2, 144, 5, dtype=torch.complex64)
    angle[:, :, 0] = 1.0
    angle.requires_grad_()
    eigenvalues = spectrum(joint_factor(angle, angle))
    counts = count_features(eigenvalues, torch.zeros(2), **NETWORK_SIZES)
    for features in (lag_features(angle), spectrum_features(eigenvalues), counts):
        (grad,) = torch.autograd.grad(features.sum(), angle, retain_graph=True)
        assert torch.isfinite(torch.view_as_real(grad)).all()

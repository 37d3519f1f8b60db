"""Every loss term agrees with a slow dense computation in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference_trainer import terms
from reference_trainer.factors import load_weight, scale_to_trace
from tests.reference_trainer.scene_batches import complex_noise

seeds = st.integers(0, 2**31)
counts = st.lists(st.integers(1, 3), min_size=4, max_size=4)


def covariance(factor: Tensor) -> Tensor:
    """Return the dense covariance."""
    return factor @ factor.mH


def factors(seed: int, columns: int, *, elements: int = 8, scenes: int = 4) -> Tensor:
    """Return random factors of trace N."""
    return scale_to_trace(complex_noise(scenes, elements, columns, seed=seed))


def active_slots(num_sources: list[int]) -> Tensor:
    """Return which of three slots hold a source."""
    return torch.arange(3) < torch.tensor(num_sources)[:, None]


def reals(seed: int, *shape: int) -> Tensor:
    """Return real noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@given(seeds, st.integers(1, 6), st.integers(1, 4), st.floats(-60.0, 20.0))
def test_covariance_error_is_that_of_the_dense_loaded_covariances(seed, columns, rank, snr_db):
    """The factor form equals ||E - E_true||^2 / ||E_true||^2 with both covariances loaded alike."""
    factor, true = factors(seed, columns), factors(seed + 1, rank)
    snr = torch.full((4,), snr_db, dtype=torch.float64)
    load = load_weight(snr)[:, None, None]
    loaded, loaded_true = (
        (1 - load) * covariance(f) + load * torch.eye(8, dtype=torch.complex128)
        for f in (factor, true)
    )
    wanted = (loaded - loaded_true).abs().square().sum((1, 2))
    wanted /= loaded_true.abs().square().sum((1, 2))
    torch.testing.assert_close(terms.covariance_error(factor, true, snr), wanted)


@given(seeds, st.integers(2, 6), counts)
def test_eigengap_is_that_of_the_dense_covariance(seed, columns, num_sources):
    """The gap after eigenvalue K is the dense one, also where K is all columns there are."""
    factor = factors(seed, max(columns, max(num_sources)))
    dense = torch.linalg.eigvalsh(covariance(factor)).flip(-1) / 8
    wanted = [row[k - 1] - row[k] for row, k in zip(dense, num_sources, strict=True)]
    gap = terms.eigengap(factor, torch.tensor(num_sources))
    torch.testing.assert_close(gap, torch.stack(wanted))


def test_the_eigengap_hinge_asks_for_no_more_than_the_truth_has():
    """Short of the margin or of a smaller true gap it is the shortfall, otherwise zero."""
    gaps = {"wide": (6.0, 2.0), "narrow": (4.1, 3.9), "none": (4.0, 4.0)}
    factor = {
        name: torch.eye(8, 2).mul(torch.tensor(pair).sqrt()).to(torch.complex64)[None]
        for name, pair in gaps.items()
    }
    one = torch.tensor([1])

    def hinge(predicted: str, true: str) -> float:
        return terms.eigengap_hinge(factor[predicted], factor[true], one).item()

    assert hinge("none", "wide") == pytest.approx(terms.EIGENGAP_MARGIN)
    assert hinge("none", "narrow") == pytest.approx(0.2 / 8, abs=1e-6)
    assert hinge("narrow", "wide") == pytest.approx(terms.EIGENGAP_MARGIN - 0.2 / 8, abs=1e-6)
    assert hinge("wide", "narrow") == 0.0


@given(seeds, st.integers(1, 6), counts)
def test_misaligned_share_is_the_power_the_dense_projector_leaves(seed, columns, num_sources):
    """It is 1 - tr(P R) / tr(R) with the dense projector P on the true subspace."""
    factor = factors(seed, columns)
    basis = torch.linalg.qr(complex_noise(4, 8, 3, seed=seed + 1)).Q
    basis = basis * active_slots(num_sources)[:, None]
    dense = covariance(factor)
    inside = torch.einsum("bij,bji->b", covariance(basis), dense).real
    torch.testing.assert_close(terms.misaligned_share(factor, basis), 1 - inside / 8)


@given(seeds, st.integers(1, 6), counts)
def test_contrast_compares_the_dense_power_around_each_source(seed, columns, num_sources):
    """The divergence of softmax(a^H R a / largest / 0.1) over the stencil, source by source."""
    factor, true = factors(seed, columns), factors(seed + 1, 3)
    stencil = complex_noise(4, 3, 5, 8, seed=seed + 2)
    wanted = []
    for scene, sources in enumerate(num_sources):
        divergences = []
        for source in range(sources):
            shares = []
            for dense in (covariance(factor[scene]), covariance(true[scene])):
                power = [(a.conj() @ dense @ a).real for a in stencil[scene, source]]
                shares.append(torch.softmax(torch.stack(power) / max(power) / 0.1, dim=0))
            predicted, target = shares
            divergences.append((target * (target / predicted).log()).sum())
        wanted.append(sum(divergences) / sources)
    got = terms.contrast_divergence(factor, true, stencil, active_slots(num_sources))
    torch.testing.assert_close(got, torch.stack(wanted))


@given(seeds)
def test_cross_gram_error_compares_column_correlations(seed):
    """The mean over pairs of different columns of the squared difference of their correlations."""
    angle, ranged = factors(seed, 3), factors(seed + 1, 3)

    def correlation(factor: Tensor, i: int, j: int) -> complex:
        left, right = factor[:, i], factor[:, j]
        return complex((left.conj() @ right) / (left.norm() * right.norm()))

    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    wanted = [
        sum(abs(correlation(a, i, j) - correlation(r, i, j)) ** 2 for i, j in pairs) / 6
        for a, r in zip(angle, ranged, strict=True)
    ]
    got = terms.cross_gram_error(angle, ranged)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))


@given(seeds, counts)
def test_source_count_divergence_is_cross_entropy_less_the_targets_entropy(seed, num_sources):
    """It differs from torch's smoothed cross entropy by a constant only."""
    logits, classes = reals(seed, 4, 3), torch.tensor(num_sources)
    cross_entropy = torch.nn.functional.cross_entropy(
        logits, classes - 1, reduction="none", label_smoothing=0.05
    )
    entropy = torch.distributions.Categorical(
        torch.tensor([0.95 + 0.05 / 3, 0.05 / 3, 0.05 / 3], dtype=torch.float64)
    ).entropy()
    divergence = terms.source_count_divergence(logits, classes)
    torch.testing.assert_close(divergence, cross_entropy - entropy)


def rounded_abs(error: float, threshold: float) -> float:
    """Huber's function over its threshold."""
    size = abs(error)
    return size**2 / (2 * threshold) if size < threshold else size - threshold / 2


@given(seeds, counts, st.floats(1e-4, 1.0))
def test_aux_errors_are_means_over_sources_of_hubers_function(seed, num_sources, size):
    """Angles weigh 1 and 1.5 with a threshold of 0.25 deg; log distance has a threshold of 0.2."""
    azimuth, elevation, log_range = size * reals(seed, 3, 4, 3)
    zero, active = torch.zeros(4, 3, dtype=torch.float64), active_slots(num_sources)
    angle = terms.aux_angle_error(azimuth, elevation, zero, zero, active)
    distance = terms.aux_range_error(log_range.exp(), zero.exp(), active)
    for scene, sources in enumerate(num_sources):
        slots = range(sources)
        h = [rounded_abs(float(azimuth[scene, s]), math.radians(0.25)) for s in slots]
        h += [1.5 * rounded_abs(float(elevation[scene, s]), math.radians(0.25)) for s in slots]
        assert angle[scene].item() == pytest.approx(sum(h) / sources, abs=1e-9)
        h = [rounded_abs(float(log_range[scene, s]), 0.2) for s in slots]
        assert distance[scene].item() == pytest.approx(sum(h) / sources, abs=1e-9)


@given(seeds, counts)
def test_chamfer_is_the_distance_to_the_nearest_in_both_directions(seed, num_sources):
    """Loops over the active slots give the same."""
    predicted, true = reals(seed, 2, 4, 3, 2)
    active = active_slots(num_sources)
    got = terms.chamfer_error(*predicted.unbind(-1), *true.unbind(-1), active)
    for scene, sources in enumerate(num_sources):
        ours, theirs = predicted[scene, :sources], true[scene, :sources]
        there = [min(float((p - t).square().sum()) for t in theirs) for p in ours]
        back = [min(float((p - t).square().sum()) for p in ours) for t in theirs]
        assert got[scene].item() == pytest.approx(sum(there + back) / sources)


@given(seeds, st.permutations(range(3)))
def test_chamfer_does_not_see_the_order_of_the_sources(seed, order):
    """A set of directions is the same set in any order."""
    predicted, true = reals(seed, 2, 4, 3, 2)
    everything = torch.ones(4, 3, dtype=torch.bool)
    distance = terms.chamfer_error(*predicted.unbind(-1), *true.unbind(-1), everything)
    turned = terms.chamfer_error(*predicted[:, order].unbind(-1), *true.unbind(-1), everything)
    torch.testing.assert_close(turned, distance)


def covariance_terms(factor: Tensor) -> Tensor:
    """All terms of a predicted factor whose gradient has a closed smooth form."""
    true, snr_db = factors(7, 3), torch.zeros(4, dtype=torch.float64)
    basis = torch.linalg.qr(true).Q
    return torch.stack(
        [
            terms.covariance_error(factor, true, snr_db),
            terms.misaligned_share(factor, basis),
            terms.cross_gram_error(factor, true),
            terms.eigengap(factor, torch.tensor([1, 2, 3, 3])),
        ]
    )


def test_gradients_of_the_covariance_terms_agree_with_differences():
    """Autograd and finite differences agree for every term without a detached part."""
    factor = factors(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(covariance_terms, (factor,))

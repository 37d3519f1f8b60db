"""The hybrid covariance, its schedule, and ranks that mean something."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference_trainer.covariance import (
    BlendSchedule,
    factor_of,
    hybrid_factor,
    principal_factor,
    rank_report,
)
from reference_trainer.physics import ScenePhysics
from reference_trainer.scenes import draw_scenes
from reference_trainer.subspace import deflation_weights, extended, signal_basis
from tests.reference_trainer.scene_batches import complex_noise

seeds = st.integers(0, 2**31)


def dense(factor: Tensor) -> Tensor:
    """Return the covariance."""
    return factor @ factor.mH


def orthonormal(rows: int, columns: int, *, seed: int, batch: int = 1) -> Tensor:
    """Return random orthonormal columns, complex128."""
    return torch.linalg.qr(complex_noise(batch, rows, columns, seed=seed)).Q


@given(seeds, st.floats(0, 0.95), st.floats(1e-3, 1e3))
def test_the_hybrid_is_the_blend_of_the_scaled_covariances(seed, share, scale):
    """(1 - share) R_pred + share R_samp, both of trace N whatever their scale was."""
    predicted, sample = complex_noise(2, 9, 3, seed=seed), complex_noise(2, 9, 4, seed=seed + 1)
    blend = dense(hybrid_factor(scale * predicted, sample, share=share))
    one, other = (
        9 * dense(part) / dense(part).diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        for part in (predicted, sample)
    )
    torch.testing.assert_close(blend, (1 - share) * one + share * other)


@given(st.integers(1, 200), st.floats(0, 0.95), st.floats(0, 0.2), st.integers(0, 99))
def test_the_share_rises_and_then_jitters_about_its_end(epochs, share, jitter, seed):
    """It starts at 0, never falls while it rises, and then stays within the jitter."""
    schedule = BlendSchedule(epochs=epochs, share=share, jitter=jitter, seed=seed)
    shares = [schedule.at(epoch) for epoch in range(epochs + 3)]
    rising = max(2, math.ceil(epochs / 5))
    assert shares[0] == 0.0
    assert shares[:rising] == sorted(shares[:rising])
    assert all(0.0 <= value <= 0.95 for value in shares)
    assert all(abs(value - share) <= jitter + 1e-12 for value in shares[rising:])
    assert shares == [schedule.at(epoch) for epoch in range(epochs + 3)]


def test_the_published_schedule():
    """Thirty epochs: six steps of 0.05 to 0.30, then jitter of 0.05 that really varies."""
    schedule = BlendSchedule(epochs=30)
    assert [schedule.at(epoch) for epoch in range(6)] == pytest.approx(
        [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]
    )
    later = np.array([schedule.at(epoch) for epoch in range(6, 2000)])
    assert later.min() == pytest.approx(0.25, abs=1e-3)
    assert later.max() == pytest.approx(0.35, abs=1e-3)
    assert later.mean() == pytest.approx(0.3, abs=2e-3)
    assert BlendSchedule(epochs=30, share=0.0).at(20) == 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("share", 0.96),
        *(
            (name, value)
            for name in ("share", "jitter", "rise_fraction")
            for value in (-0.1, math.nan)
        ),
        ("jitter", 1.5),
    ],
)
def test_a_schedule_out_of_bounds_is_refused(field, value):
    """The error names the field and the value; NaN fits nothing."""
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        replace(BlendSchedule(epochs=10), **{field: value})


@given(seeds, st.integers(1, 12))
def test_a_principal_factor_is_the_best_of_its_rank(seed, columns):
    """Its covariance is the truncated eigendecomposition, scaled to trace N."""
    factor = complex_noise(2, 8, 5, seed=seed)
    power, vectors = torch.linalg.eigh(dense(factor))
    power[:, : max(0, 8 - columns)] = 0.0
    expected = (vectors * power[:, None, :]) @ vectors.mH
    expected = expected * (8 / power.sum(-1))[:, None, None]
    found = principal_factor(factor, columns=columns)
    assert found.shape == (2, 8, columns)
    torch.testing.assert_close(dense(found), expected.to(torch.complex64), rtol=0, atol=1e-4)


@given(seeds, st.integers(1, 9))
def test_a_covariance_and_its_factor_say_the_same(seed, columns):
    """The factor of a dense covariance gives it back, also where it is singular."""
    covariance = dense(complex_noise(2, 6, columns, seed=seed))
    torch.testing.assert_close(dense(factor_of(covariance)), covariance)


def test_only_square_matrices_have_a_factor():
    """A factor in the place of a covariance is an error that shows its shape."""
    with pytest.raises(ValueError, match=r"\(1, 6, 3\); expected \[B, N, N\]"):
        factor_of(complex_noise(1, 6, 3))


@given(seeds, st.integers(1, 5))
def test_equal_directions_have_their_number_as_every_rank(seed, rank):
    """With n equal eigenvalues, count, entropy rank and participation ratio are all n."""
    basis = orthonormal(10, rank, seed=seed)
    report = rank_report(3 * basis, num_sources=torch.tensor([rank]), true_basis=basis)
    for value in (report.count, report.entropy_rank, report.participation_ratio):
        assert value.item() == pytest.approx(rank)
    assert report.energy_in_top.item() == pytest.approx(1.0)
    assert report.overlap.item() == pytest.approx(1.0)
    assert report.chance.item() == pytest.approx(rank / 10)


def test_the_report_agrees_with_dense_eigenvalues():
    """Every figure is what its definition gives for the 144 eigenvalues of the dense matrix."""
    scenes = draw_scenes(ScenePhysics(symbols="iid"), seed=1, split="train", indices=range(5))
    report = rank_report(
        scenes.estimate, num_sources=scenes.num_sources, true_basis=scenes.true_basis
    )
    for scene in range(5):
        count = int(scenes.num_sources[scene])
        factor = scenes.estimate[scene].to(torch.complex128)
        power, vectors = (part.flip(-1) for part in torch.linalg.eigh(dense(factor)))
        share = (power.clamp_min(0) / power.sum()).numpy()
        assert report.count[scene].item() == (share > 1e-6 * share[0]).sum() == 16
        entropy = -sum(p * math.log(p) for p in share if p > 0)
        assert report.entropy_rank[scene].item() == pytest.approx(math.exp(entropy))
        assert report.participation_ratio[scene].item() == pytest.approx(1 / (share**2).sum())
        assert report.energy_in_top[scene].item() == pytest.approx(share[:count].sum())
        inside = vectors[:, :count].mH @ scenes.true_basis[scene].to(torch.complex128)
        assert report.overlap[scene].item() == pytest.approx(
            float(inside.abs().square().sum()) / count, rel=1e-4
        )


def test_chance_is_what_a_random_subspace_overlaps():
    """The overlap of random factors has the mean that the report calls chance."""
    count = torch.full((400,), 3)
    report = rank_report(
        complex_noise(400, 20, 6),
        num_sources=count,
        true_basis=orthonormal(20, 3, seed=5, batch=400),
    )
    assert report.overlap.mean().item() == pytest.approx(report.chance[0].item(), rel=0.05)


def test_blending_adds_ranks_and_says_nothing_about_the_truth():
    """Rank 5 and rank 15 make rank 20 for any prediction, which is why overlap is reported."""
    predicted, sample = complex_noise(4, 144, 5), complex_noise(4, 144, 15, seed=1)
    report = rank_report(
        hybrid_factor(predicted, sample, share=0.3),
        num_sources=torch.full((4,), 3),
        true_basis=orthonormal(144, 3, seed=9, batch=4),
    )
    assert report.count.tolist() == [20] * 4
    assert report.overlap.max() < 0.1


@given(seeds, st.integers(1, 4), st.integers(1, 12))
def test_a_signal_basis_spans_the_top_eigenvectors(seed, count, columns):
    """Its projector is that of the dense eigendecomposition, of the rank the factor has."""
    factor = complex_noise(1, 8, columns, seed=seed)
    basis = signal_basis(factor, torch.tensor([count]), width=4)
    vectors = torch.linalg.eigh(dense(factor)).eigenvectors[0, :, -min(count, columns) :]
    torch.testing.assert_close(dense(basis)[0], dense(vectors), rtol=0, atol=1e-8)


@given(seeds, st.integers(1, 4), st.integers(0, 3), st.integers(0, 4))
def test_deflating_leaves_what_is_orthogonal_to_the_found(seed, sources, found, dimensions):
    """The rest is orthonormal, orthogonal to what was found, and all of it where room is left."""
    basis, vectors = orthonormal(9, sources, seed=seed), complex_noise(1, 9, found, seed=seed + 1)
    columns = basis[..., :0]
    for index in range(found):
        columns = extended(columns, vectors[..., index])
    rest = torch.cat((basis, columns), -1) @ deflation_weights(
        basis, columns, torch.tensor([dimensions])
    )
    kept = min(sources, dimensions)
    expected = torch.diag(torch.tensor([1.0] * kept + [0.0] * (sources - kept)))
    torch.testing.assert_close((rest.mH @ rest)[0].real, expected.double(), rtol=0, atol=1e-6)
    assert (columns.mH @ rest).abs().max() < 1e-6 if found else True
    if dimensions >= sources:
        projected = basis - columns @ (columns.mH @ basis)
        torch.testing.assert_close(dense(rest) @ projected, projected, rtol=0, atol=1e-6)

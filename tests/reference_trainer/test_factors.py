"""Factors say the same as the dense covariances they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference_trainer.factors import (
    RANGE_SHARE,
    blended_factor,
    joint_factor,
    load_weight,
    pack_complex,
    scale_to_trace,
    spectrum,
    squared_norm,
    unpack_complex,
)
from tests.reference_trainer.scene_batches import complex_noise

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 6)


def covariance(factor: Tensor) -> Tensor:
    """Return the dense covariance."""
    return factor @ factor.conj().transpose(-2, -1)


@given(st.lists(sizes, max_size=2), sizes, sizes, seeds)
def test_packing_a_matrix_and_unpacking_it_gives_it_back(batch, rows, columns, seed):
    """Packing and unpacking are inverse for every shape."""
    matrix = complex_noise(*batch, rows, columns, seed=seed)
    assert torch.equal(unpack_complex(pack_complex(matrix), columns), matrix)


@given(sizes, sizes, st.data())
def test_packed_numbers_are_interleaved(rows, columns, data):
    """Entry (n, k) is made of the numbers 2 (n columns + k) and the one after, as published."""
    packed = torch.arange(2.0 * rows * columns)
    row = data.draw(st.integers(0, rows - 1))
    column = data.draw(st.integers(0, columns - 1))
    place = 2 * (row * columns + column)
    assert unpack_complex(packed, columns)[row, column] == complex(place, place + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_unpacked_half_precision_is_widened(dtype):
    """Complex arithmetic never happens in half precision."""
    assert unpack_complex(torch.ones(2, 20, dtype=dtype), 5).dtype == torch.complex64


def test_unpacking_numbers_that_do_not_fit_says_what_would():
    """A wrong number of columns is refused with the sizes in the message."""
    with pytest.raises(ValueError, match=r"last axis of 12, expected a multiple of 10"):
        unpack_complex(torch.zeros(3, 12), 5)


@given(seeds, sizes, st.floats(1e-3, 1e3))
def test_scaling_sets_the_trace_and_nothing_else(seed, columns, size):
    """The covariance of a scaled factor has trace N and the old direction."""
    factor = complex_noise(3, 7, columns, seed=seed)
    scaled = scale_to_trace(size * factor)
    trace = covariance(scaled).diagonal(dim1=-2, dim2=-1).real.sum(-1)
    torch.testing.assert_close(trace, torch.full_like(trace, 7.0))
    torch.testing.assert_close(scaled, scale_to_trace(factor))


def test_a_zero_factor_has_a_finite_gradient():
    """Scaling a factor of no power divides by nothing: zero stays zero, the gradient is finite."""
    factor = torch.zeros(2, 7, 3, dtype=torch.complex64, requires_grad=True)
    scaled = scale_to_trace(factor)
    torch.view_as_real(scaled).sum().backward()
    assert not scaled.any()
    assert torch.isfinite(torch.view_as_real(factor.grad)).all()


@given(seeds)
def test_the_joint_factor_is_that_of_the_weighted_sum(seed):
    """Its covariance is A A^H + 0.1 A_r A_r^H, scaled to trace N."""
    angle, ranged = complex_noise(2, 2, 9, 3, seed=seed)
    dense = covariance(angle) + RANGE_SHARE * covariance(ranged)
    dense = 9 * dense / dense.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    torch.testing.assert_close(covariance(joint_factor(angle, ranged)), dense)


@given(seeds, st.floats(0.0, 0.99))
def test_the_blended_factor_is_that_of_the_blended_covariance(seed, blend):
    """Its covariance is (1 - blend) F F^H + blend X X^H."""
    factor, sample = complex_noise(2, 9, 4, seed=seed), complex_noise(2, 9, 2, seed=seed + 1)
    dense = (1 - blend) * covariance(factor) + blend * covariance(sample)
    torch.testing.assert_close(covariance(blended_factor(factor, sample, blend)), dense)


@pytest.mark.parametrize("blend", [-0.1, 1.0, math.nan])
def test_a_blend_that_is_no_share_is_refused(blend):
    """Only shares in [0, 1) are taken: at 1 nothing of the prediction would be left."""
    factor = complex_noise(1, 4, 2)
    with pytest.raises(ValueError, match="blend"):
        blended_factor(factor, factor, blend)


@given(seeds, sizes)
def test_the_spectrum_is_that_of_the_dense_covariance(seed, columns):
    """The eigenvalues of F F^H are those returned, largest first, and zeros."""
    factor = complex_noise(3, 8, columns, seed=seed)
    dense = torch.linalg.eigvalsh(covariance(factor)).flip(-1)
    torch.testing.assert_close(spectrum(factor), dense[..., :columns])
    assert dense[..., columns:].abs().max() < 1e-12


def test_ties_and_missing_rank_leave_the_gradient_finite():
    """Equal and zero eigenvalues are harmless, as no eigenvector is differentiated."""
    factor = torch.zeros(1, 8, 6, dtype=torch.complex64)
    factor[0, 0, 0] = factor[0, 1, 1] = factor[0, 2, 2] = 2.0
    factor.requires_grad_()
    (spectrum(factor) * torch.arange(6.0)).sum().backward()
    assert torch.isfinite(torch.view_as_real(factor.grad)).all()
    assert factor.grad.abs().max() > 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_scene_gives_nan_and_leaves_its_neighbours_alone(poison):
    """NaN in, NaN out, where the eigenvalue routine alone would raise."""
    factor = complex_noise(3, 8, 4)
    clean = spectrum(factor)
    factor[1, 0, 0] = poison
    poisoned = spectrum(factor)
    assert poisoned[1].isnan().all()
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])


def test_more_noise_means_more_load():
    """The load falls with the signal-to-noise ratio and stays within its bounds."""
    load = load_weight(torch.tensor([-60.0, -5.0, 0.0, 20.0, 60.0]))
    expected = torch.tensor([0.05, 1e-3 * 10**0.25, 1e-3, 1e-4, 1e-4])
    torch.testing.assert_close(load, expected)


def test_squared_norm_is_the_trace():
    """The squared norm of a factor is the trace of its covariance."""
    factor = complex_noise(4, 8, 3)
    trace = covariance(factor).diagonal(dim1=-2, dim2=-1).sum(-1).real
    torch.testing.assert_close(squared_norm(factor), trace)

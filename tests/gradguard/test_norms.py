"""Norms and counts of many tensors agree with slow independent computations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradguard as gg
from gradguard.norms import norm_plan, planned_norms, zero_tests

KINDS = {
    "float32": lambda g: torch.randn(5, 3, generator=g),
    "float64": lambda g: torch.randn(4, generator=g, dtype=torch.float64),
    "float16": lambda g: torch.randn(7, generator=g).half(),
    "bfloat16": lambda g: torch.randn(7, generator=g).bfloat16(),
    "complex64": lambda g: torch.randn(3, 2, generator=g, dtype=torch.complex64),
    "conjugate": lambda g: torch.randn(3, generator=g, dtype=torch.complex64).conj(),
    "float8": lambda g: torch.randn(6, generator=g).to(torch.float8_e4m3fn),
    "scalar": lambda g: torch.randn((), generator=g),
    "empty": lambda _: torch.zeros(0, 3),
    "expanded": lambda g: torch.randn(1, generator=g).expand(4),
    "transposed": lambda g: torch.randn(5, 3, generator=g).t(),
    "sparse": lambda g: torch.randn(4, 4, generator=g).relu().to_sparse(),
    "csr": lambda g: torch.randn(4, 4, generator=g).relu().to_sparse_csr(),
}


def as_numbers(tensor):
    """Return all entries as a list of Python numbers, by the slowest route."""
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    if dense.dtype in (torch.float8_e4m3fn,):
        dense = dense.float()
    return dense.resolve_conj().reshape(-1).tolist()


@given(kinds=st.lists(st.sampled_from(sorted(KINDS)), max_size=6), seed=st.integers(0, 99))
def test_norms_agree_with_python_arithmetic(kinds, seed):
    """Every mixture of dtypes and layouts gives the norms that plain Python numbers give."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [KINDS[kind](generator) for kind in kinds]
    expected = [math.hypot(*(abs(x) for x in as_numbers(t))) for t in tensors]
    assert gg.tensor_norms(tensors).tolist() == pytest.approx(expected, rel=1e-5)
    assert float(gg.global_norm(tensors)) == pytest.approx(math.hypot(*expected), rel=1e-5)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_large_tensors_keep_their_place_and_their_accuracy(place):
    """A million values beside small ones: norms are in the order given, and within 1e-5 of float64's."""
    tensors = [torch.randn(7), torch.randn(3, 5)]
    tensors.insert(place, torch.randn(1000, 1000) + 0.5)
    expected = [float(torch.linalg.vector_norm(t.double())) for t in tensors]
    assert gg.tensor_norms(tensors).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_entry_among_a_million_is_seen(value):
    """NaN and Inf make the norm of a large tensor non-finite, too."""
    tensor = torch.ones(1000, 1000)
    tensor[123, 456] = value
    assert not gg.tensor_norms([tensor]).isfinite().any()


def test_half_precision_norms_do_not_overflow():
    """600,000 entries of 100 in fp16 have norm 77,460, beyond what fp16 can hold."""
    norm = gg.tensor_norms([torch.full((600_000,), 100.0, dtype=torch.float16)])
    assert norm.tolist() == pytest.approx([100 * math.sqrt(600_000)], rel=1e-3)


def test_nonfinite_counts_are_exact_for_every_kind():
    """NaN and Inf are counted by entry, complex numbers by component."""
    tensors = [
        torch.tensor([math.nan, math.inf, -math.inf, 1.0]),
        torch.tensor([complex(math.nan, math.inf), 1 + 1j]),
        torch.tensor([math.nan, 1.0]).to(torch.float8_e4m3fn),
        torch.tensor([[0.0, math.nan], [math.inf, 0.0]]).to_sparse(),
        torch.ones(2, dtype=torch.float64),
    ]
    assert gg.nonfinite_counts(tensors).tolist() == [[1, 1, 1, 1, 0], [2, 1, 0, 1, 0]]
    assert gg.nonfinite_counts([]).shape == (2, 0)


def test_nothing_is_written():
    """Reading norms and counts leaves every version counter and every sparse layout alone."""
    dense = torch.randn(3)
    sparse = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (2,))
    versions = dense._version, sparse._version
    gg.tensor_norms([dense, sparse])
    gg.nonfinite_counts([dense, sparse])
    assert (dense._version, sparse._version) == versions
    assert not sparse.is_coalesced()


SHAPES = [(), (3,), (53,), (53, 53), (4, 5, 6), (4096,), (17, 241), (300, 300)]
VALUES = [0.0, 1.0, -2.5, 1e-40, 1e25, math.inf, -math.inf, math.nan]
CASTS = [torch.float32] * 6 + [torch.float16, torch.bfloat16, torch.float64]


@st.composite
def small_tensors(draw):
    """Return many tensors of few shapes, mostly float32, some with a special value or a strange stride."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tensors = []
    for _ in range(draw(st.integers(1, 20))):
        shape = draw(st.sampled_from(SHAPES))
        tensor = torch.randn(shape, generator=generator)
        if draw(st.booleans()):
            place = draw(st.integers(0, tensor.numel() - 1))
            tensor.view(-1)[place] = draw(st.sampled_from(VALUES))
        if draw(st.booleans()) and tensor.dim() > 1:
            tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        tensors.append(tensor.to(draw(st.sampled_from(CASTS))))
    return tensors


def is_norm_of(tensor, norm):
    """Whether it is the norm in float64, or infinite where squares overflow in float32.

    Which of the two a large finite entry gives depends on whether a float64 tensor shares its kernel.
    """
    wide = tensor.double()
    if math.isinf(norm) and float(wide.abs().max()) > 1.8e19:
        return not wide.isnan().any()
    exact = float(torch.linalg.vector_norm(wide))
    return norm == pytest.approx(exact, rel=1e-5, abs=1e-22, nan_ok=True)


@given(tensors=small_tensors())
def test_many_small_tensors_have_the_norms_of_each_alone(tensors):
    """Tensors that share a kernel have the norms that float64 gives one by one, NaN and Inf included."""
    found = gg.tensor_norms(tensors).tolist()
    assert all(is_norm_of(t, norm) for t, norm in zip(tensors, found, strict=True))


@given(planned=small_tensors(), tensors=small_tensors())
def test_a_plan_for_other_tensors_changes_no_norm(planned, tensors):
    """With a plan that no longer fits, in number, shape, dtype or stride, the norms are right all the same."""
    found = planned_norms(tensors, norm_plan(planned)).tolist()
    assert all(is_norm_of(t, norm) for t, norm in zip(tensors, found, strict=True))


def test_a_plan_survives_gradients_turned_half():
    """Large tensors that became fp16 since they were planned are not accumulated in fp16."""
    large = torch.full((300, 300), 300.0)
    halves = [large.half(), torch.ones(3).half()]
    found = planned_norms(halves, norm_plan([large, torch.ones(3)]))
    assert found.tolist() == pytest.approx([90_000.0, math.sqrt(3)], rel=1e-3)


def test_tensors_of_one_shape_share_a_kernel():
    """300 small tensors of two shapes are read with a few operations, and copied 131,072 values at a time."""
    tensors = [torch.randn(53, 53) if i % 2 else torch.randn(53) for i in range(300)]
    plan = norm_plan(tensors)
    assert plan.others == plan.large == ()
    assert len(plan.alike) == 5
    assert all(sum(t.numel() for t in pick(tensors)) <= 2**17 for pick in plan.alike)


@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1e-45, -1e-30, 1.0, -3e38, math.inf, -math.inf, math.nan]),
        min_size=4,
        max_size=12,
    ),
    data=st.data(),
)
def test_zero_tests_of_many_alike_are_those_of_each(values, data):
    """Small tensors of few shapes, which share their kernels, each have the answer they have alone."""
    shapes = st.sampled_from([(), (3,), (2, 2)])
    tensors = [torch.full(data.draw(shapes), value) for value in values]
    found = zero_tests(tensors, gg.tensor_norms(tensors))
    alone = [zero_tests([one], gg.tensor_norms([one])).item() for one in tensors]
    assert [value == 0 for value in found.tolist()] == [value == 0 for value in alone]
    assert found.isfinite().tolist() == [math.isfinite(value) for value in alone]
    assert [value == 0 for value in alone] == [value == 0 for value in values]


@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1e-45, -1e-30, 1.0, -3e38, math.inf, -math.inf, math.nan]),
        min_size=1,
        max_size=4,
    ),
    sizes=st.permutations([3, 2**16, 2**17, 5000]),
    place=st.integers(0, 2**16 - 1),
)
def test_a_zero_test_is_zero_only_for_zeros_and_finite_only_for_finite_values(values, sizes, place):
    """Large and small tensors in any order: one entry that is not zero, or not finite, is enough."""
    tensors = [torch.zeros(size) for size in sizes]
    for tensor, value in zip(tensors, values, strict=False):
        tensor[place % len(tensor)] = value
    found = zero_tests(tensors, gg.tensor_norms(tensors))
    expected = [*values, *[0.0] * (len(sizes) - len(values))]
    assert (found == 0).tolist() == [value == 0 for value in expected]
    assert found.isfinite().tolist() == [math.isfinite(value) for value in expected]
    assert not bool((found < 0).any())

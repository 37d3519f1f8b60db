"""The strategies reach what they promise, and nothing that they exclude."""

from __future__ import annotations

from collections import Counter

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import Tensor

from gradguard.testing import (
    ALL_DTYPES,
    ALL_LAYOUTS,
    FLOAT8_DTYPES,
    FLOAT_DTYPES,
    OverflowSequence,
    bits_of,
    gradients,
    overflow_sequences,
    parameter_sets,
    parameter_with,
)

NAN = float("nan")
quick = settings(max_examples=30, deadline=None)


def found(strategy: st.SearchStrategy[Tensor], condition: object) -> bool:
    """Say whether the strategy can produce a value that satisfies the condition."""
    try:
        hypothesis.find(
            strategy, condition, settings=settings(max_examples=800, deadline=None, database=None)
        )
    except NoSuchExample:
        return False
    return True


def is_finite(gradient: Tensor) -> bool:
    """Say whether all stored numbers are finite."""
    if gradient.layout is not torch.strided:
        gradient = gradient._values() if gradient.layout is torch.sparse_coo else gradient.values()
    reals = torch.view_as_real(gradient.detach()) if gradient.is_complex() else gradient
    return bool(reals.double().isfinite().all())


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype_has_finite_and_nonfinite_gradients(dtype: torch.dtype) -> None:
    """Both kinds keep their promise for every dtype, in every layout."""

    @quick
    @given(
        finite=gradients(dtypes=[dtype], kind="finite"),
        nonfinite=gradients(dtypes=[dtype], kind="nonfinite"),
    )
    def check(finite: Tensor, nonfinite: Tensor) -> None:
        assert finite.dtype == nonfinite.dtype == dtype
        assert is_finite(finite)
        assert not is_finite(nonfinite)

    check()


def test_every_layout_is_drawn() -> None:
    """Every layout in the list appears, for every dtype that torch has it for."""
    seen: Counter[tuple[torch.dtype, torch.layout]] = Counter()

    @settings(max_examples=250, deadline=None, database=None, derandomize=True)
    @given(gradients(max_entries=2))
    def collect(gradient: Tensor) -> None:
        seen[gradient.dtype, gradient.layout] += 1

    collect()
    assert {dtype for dtype, _ in seen} == set(ALL_DTYPES)
    assert {layout for _, layout in seen} == {torch.strided, torch.sparse_coo, torch.sparse_csr}
    assert not any(d in FLOAT8_DTYPES for d, layout in seen if layout is not torch.strided)


SHAPES = {
    "scalar": lambda g: g.dim() == 0,
    "empty": lambda g: g.numel() == 0,
    "transposed": lambda g: g.dim() == 2 and not g.is_contiguous(),
    "strided": lambda g: g.dim() == 1 and g.stride() == (2,),
    "channels_last": lambda g: g.is_contiguous(memory_format=torch.channels_last),
    "expanded": lambda g: 0 in g.stride() and g.numel() > 1,
    "coo": lambda g: g.layout is torch.sparse_coo and g.is_coalesced(),
    "coo_uncoalesced": lambda g: g.layout is torch.sparse_coo and g._nnz() > 1,
    "csr": lambda g: g.layout is torch.sparse_csr,
    "contiguous": lambda g: g.dim() == 1 and g.is_contiguous() and g.numel() > 0,
}


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_layout_is_what_its_name_says(layout: str) -> None:
    """A gradient drawn with one layout can look as that name says."""
    assert found(gradients(dtypes=[torch.float32], layouts=[layout]), SHAPES[layout])


SPECIAL = {
    "negative zero": 0x8000,
    "smallest subnormal": 0x0001,
    "largest subnormal": 0x03FF,
    "largest finite": 0x7BFF,
    "infinity": 0x7C00,
    "negative infinity": 0xFC00,
    "quiet NaN": 0x7E00,
    "negative NaN": 0xFE00,
    "signalling NaN": 0x7C01,
    "NaN with full payload": 0x7FFF,
    "any other NaN payload": 0x7D55,
}


@pytest.mark.parametrize("name", [n for n in SPECIAL if n != "any other NaN payload"])
def test_special_values_are_likely(name: str) -> None:
    """Each special bit pattern of a format turns up quickly."""
    drawn = gradients(dtypes=[torch.float16], layouts=["contiguous"])
    assert found(drawn, lambda g: SPECIAL[name] in (bits_of(g).int() % 2**16).tolist())


def test_payloads_survive_into_the_gradient() -> None:
    """A NaN keeps its sign and payload on the way into ``.grad``."""
    payloads = torch.tensor([0x7D55, 0x7C01, -1], dtype=torch.int16).view(torch.float16)
    parameter = parameter_with(payloads)
    assert parameter.grad is payloads
    assert bits_of(parameter.grad).tolist() == [0x7D55, 0x7C01, -1]


@quick
@given(gradients())
def test_parameters_fit_their_gradient(gradient: Tensor) -> None:
    """Every gradient can be attached: the parameter has its shape, dtype and zeros for values."""
    parameter = parameter_with(gradient)
    assert parameter.grad is gradient
    assert (parameter.shape, parameter.dtype) == (gradient.shape, gradient.dtype)
    assert not parameter.detach().to_dense().resolve_conj().view(-1).abs().float().any() or (
        parameter.dtype in FLOAT8_DTYPES
    )


@quick
@given(parameter_sets())
def test_parameter_sets_hold_gradients(parameters: list[Tensor]) -> None:
    """A set has a gradient somewhere; everyday dtypes are the default."""
    present = [p.grad for p in parameters if p.grad is not None]
    assert present
    assert {g.dtype for g in present} <= set(FLOAT_DTYPES)


@quick
@given(overflow_sequences(max_steps=4, max_entries=2))
def test_overflow_sequences_are_well_formed(sequence: OverflowSequence) -> None:
    """All steps of a sequence have the same number of entries, and the scale is a power of two."""
    assert 1 <= len(sequence.steps) <= 4
    assert {len(step) for step in sequence.steps} in ({1}, {2})
    assert float(sequence.loss_scale).hex().startswith("0x1.0000")


@pytest.mark.parametrize("step", [(NAN,), (float("inf"),), (1.0,)])
def test_overflows_of_every_kind_appear(step: tuple[float, ...]) -> None:
    """NaN alone, Inf alone and clean steps all appear."""
    wanted = repr(step)
    assert found(overflow_sequences(), lambda s: wanted in map(repr, s.steps))


@pytest.mark.parametrize(
    "options",
    [
        {"dtypes": [torch.int32]},
        {"layouts": ["diagonal"]},
        {"kind": "infinite"},
        {"max_entries": 0},
        {"dtypes": [torch.float8_e5m2], "layouts": ["coo"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    """An unknown or impossible option is an error at once, not an empty strategy later."""
    with pytest.raises(ValueError, match=r"drawing gradients: got|no any gradients have"):
        gradients(**options)

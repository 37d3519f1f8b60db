"""Hypothesis strategies: gradients of every kind, parameter sets, overflow sequences of a scaler.

Values are drawn as bit patterns, so that every subnormal, negative zero and NaN payload can appear.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of everyday gradients; the simplest first."""

COMPLEX_DTYPES = (torch.complex64, torch.complex128, torch.complex32)

FLOAT8_DTYPES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
"""Float8 dtypes that have a zero; few torch kernels know them."""

ALL_DTYPES = FLOAT_DTYPES + COMPLEX_DTYPES + FLOAT8_DTYPES

Layout = Literal[
    "contiguous",
    "scalar",
    "empty",
    "transposed",
    "strided",
    "channels_last",
    "expanded",
    "coo",
    "coo_uncoalesced",
    "csr",
]
"""How the entries lie in memory; ``"strided"`` is every second entry of a larger buffer."""

DENSE_LAYOUTS: tuple[Layout, ...] = (
    "contiguous",
    "scalar",
    "empty",
    "transposed",
    "strided",
    "channels_last",
)
"""Layouts of everyday gradients, with memory of their own for every entry."""

ALL_LAYOUTS: tuple[Layout, ...] = get_args(Layout)

Kind = Literal["any", "finite", "nonfinite"]
"""Which values may appear: all bit patterns, finite ones only, or at least one NaN or Inf."""


@dataclass(frozen=True, slots=True)
class _Format:
    """Where a binary float format keeps its fields, to build special bit patterns."""

    width: int
    mantissa: int
    bits: torch.dtype

    def patterns(self) -> tuple[int, ...]:
        """Return the bits of 1, 0, Inf, NaN with several payloads, limits and subnormals; with sign."""
        exponent = ((1 << (self.width - 1 - self.mantissa)) - 1) << self.mantissa
        one = (exponent >> (self.mantissa + 1)) << self.mantissa
        quiet = 1 << (self.mantissa - 1)
        plain = (
            one,
            0,
            exponent,  # infinity, where the format has one
            exponent | quiet,  # the usual NaN
            exponent | 1,  # a signalling NaN
            exponent | (2 * quiet - 1),  # NaN with every payload bit set
            exponent - 1,  # largest finite
            1,  # smallest subnormal
            2 * quiet - 1,  # largest subnormal
        )
        return plain + tuple(bits | 1 << (self.width - 1) for bits in plain)


_FORMATS = {
    torch.float64: _Format(64, 52, torch.int64),
    torch.float32: _Format(32, 23, torch.int32),
    torch.float16: _Format(16, 10, torch.int16),
    torch.bfloat16: _Format(16, 7, torch.int16),
    torch.float8_e4m3fn: _Format(8, 3, torch.int8),
    torch.float8_e4m3fnuz: _Format(8, 3, torch.int8),
    torch.float8_e5m2: _Format(8, 2, torch.int8),
    torch.float8_e5m2fnuz: _Format(8, 2, torch.int8),
}
_COMPONENT = {
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
    torch.complex32: torch.float16,
}


def bits_of(values: Tensor) -> Tensor:
    """Return the bits of a dense tensor's real numbers as integers, flat; for exact comparison."""
    flat = values.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    real = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return real.view(_FORMATS[real.dtype].bits)


def gradients(
    *,
    dtypes: Sequence[torch.dtype] = ALL_DTYPES,
    layouts: Sequence[Layout] = ALL_LAYOUTS,
    kind: Kind = "any",
    max_entries: int = 6,
) -> st.SearchStrategy[Tensor]:
    """Return a strategy for gradients: every dtype, layout, special value and NaN payload.

    Args:
        dtypes: dtypes to draw from; see ``FLOAT_DTYPES``, ``COMPLEX_DTYPES``, ``FLOAT8_DTYPES``.
        layouts: memory layouts to draw from; pairs that torch does not have are left out.
        kind: which values may appear; in sparse layouts this is about the stored values.
        max_entries: largest number of numbers drawn, 1 or more; a layout may add a few.

    Raises:
        ValueError: an unknown dtype, layout or kind, or no pair of the two is possible.
    """
    _check_gradient_options(dtypes, layouts, kind, max_entries)
    pairs = [(d, y) for d in dtypes for y in layouts if _is_possible(d, y, kind)]
    if not pairs:
        raise ValueError(f"no {kind} gradients have dtypes {dtypes} and layouts {layouts}")
    _use_up_warnings()
    return _gradient(pairs, kind, max_entries)


@st.composite
def parameter_sets(
    draw: st.DrawFn,
    gradients: st.SearchStrategy[Tensor] | None = None,
    *,
    max_parameters: int = 3,
    some_without_gradient: bool = True,
) -> list[nn.Parameter]:
    """Draw parameters with gradients from ``gradients`` (default: dense ones of everyday dtypes).

    Args:
        draw: given by hypothesis.
        gradients: strategy for the gradients.
        max_parameters: largest number of parameters, 1 or more.
        some_without_gradient: whether ``.grad`` may also be None.
    """
    drawn = gradients if gradients is not None else _everyday_gradients()
    present = draw(st.lists(drawn, min_size=1, max_size=max_parameters))
    parameters = [parameter_with(gradient) for gradient in present]
    if some_without_gradient and draw(st.booleans()):
        parameters.insert(draw(st.integers(0, len(parameters))), nn.Parameter(torch.zeros(2)))
    return parameters


@dataclass(frozen=True, slots=True)
class OverflowSequence:
    """What a loss scaler meets in a few steps.

    Attributes:
        loss_scale: the initial loss scale, a power of two.
        growth_interval: good steps after which the scale doubles.
        steps: the scaled gradient of each step, as the backward pass leaves it in ``.grad``. All of
            the same length.
    """

    loss_scale: float
    growth_interval: int
    steps: tuple[tuple[float, ...], ...]


def overflow_sequences(
    *, max_steps: int = 3, max_entries: int = 3
) -> st.SearchStrategy[OverflowSequence]:
    """Return a strategy for sequences of clean and overflowing steps in any order.

    A step's gradient may hold Inf, NaN alone (as most overflows of normalised nets do), or both.
    """
    entry = st.sampled_from((1.0, float("inf"), float("-inf"), float("nan"), -1.0, 0.0, 1e38))
    steps = st.integers(1, max_entries).flatmap(
        lambda size: st.lists(st.tuples(*[entry] * size), min_size=1, max_size=max_steps).map(tuple)
    )
    return st.builds(
        OverflowSequence,
        loss_scale=st.sampled_from((2.0**16, 1.0, 2.0**24)),
        growth_interval=st.sampled_from((2000, 1, 2)),
        steps=steps,
    )


def parameter_with(gradient: Tensor) -> nn.Parameter:
    """Return a parameter of zeros that fits ``gradient`` and holds it as ``.grad``, uncopied."""
    _use_up_warnings()
    if gradient.layout is torch.sparse_csr:
        weights = gradient.clone()  # torch wants the same layout in both
        weights.values().zero_()
    else:
        weights = torch.zeros(gradient.shape, dtype=gradient.dtype)
    parameter = nn.Parameter(weights)
    parameter.grad = gradient
    return parameter


@functools.cache
def _use_up_warnings() -> None:
    """Let torch warn now about what it warns of once per process.

    In the middle of a property, with warnings as errors, that would be a failure that does not repeat.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.empty(0, dtype=torch.complex32)
        torch.eye(1).to_sparse_csr()


def _everyday_gradients() -> st.SearchStrategy[Tensor]:
    return gradients(dtypes=FLOAT_DTYPES, layouts=DENSE_LAYOUTS)


def _check_gradient_options(
    dtypes: Sequence[torch.dtype], layouts: Sequence[Layout], kind: Kind, max_entries: int
) -> None:
    unknown = [*set(dtypes).difference(ALL_DTYPES), *set(layouts).difference(ALL_LAYOUTS)]
    if unknown or kind not in get_args(Kind) or max_entries < 1:
        raise ValueError(
            f"drawing gradients: got dtypes {dtypes}, layouts {layouts}, kind {kind!r}, max_entries "
            f"{max_entries}; known dtypes {ALL_DTYPES}, layouts {ALL_LAYOUTS}, kinds "
            f"{get_args(Kind)}, max_entries from 1"
        )


def _is_possible(dtype: torch.dtype, layout: Layout, kind: Kind) -> bool:
    is_sparse = layout in ("coo", "coo_uncoalesced", "csr")
    if is_sparse and (dtype in FLOAT8_DTYPES or dtype is torch.complex32):
        return False  # torch has no such sparse kernels
    return not (kind == "nonfinite" and layout == "empty")


@st.composite
def _gradient(
    draw: st.DrawFn, pairs: Sequence[tuple[torch.dtype, Layout]], kind: Kind, max_entries: int
) -> Tensor:
    dtype, layout = draw(st.sampled_from(pairs))
    return _BUILDERS[layout](draw(_numbers(dtype, kind, max_entries)))


@st.composite
def _numbers(draw: st.DrawFn, dtype: torch.dtype, kind: Kind, max_entries: int) -> Tensor:
    """Draw a flat tensor of 1 to ``max_entries`` numbers; ``"nonfinite"``: the first one is."""
    real = _COMPONENT.get(dtype, dtype)
    count = draw(st.integers(1, max_entries)) * (2 if dtype.is_complex else 1)
    bits = draw(st.lists(_patterns(real, kind), min_size=count, max_size=count))
    if kind == "nonfinite":
        bits[0] = draw(_patterns(real, kind).filter(lambda b: not _is_finite(b, real)))
    return _from_bits(bits, dtype)


def _patterns(dtype: torch.dtype, kind: Kind) -> st.SearchStrategy[int]:
    form = _FORMATS[dtype]
    special = [b for b in form.patterns() if kind != "finite" or _is_finite(b, dtype)]
    anything = st.integers(0, 2**form.width - 1)
    if kind == "finite":
        anything = anything.filter(lambda bits: _is_finite(bits, dtype))
    return st.sampled_from(special) | anything


def _is_finite(bits: int, dtype: torch.dtype) -> bool:
    return bool(_from_bits([bits], dtype).double().isfinite().all())


def _from_bits(bits: Sequence[int], dtype: torch.dtype) -> Tensor:
    real = _COMPONENT.get(dtype, dtype)
    form = _FORMATS[real]
    half = 1 << (form.width - 1)
    signed = [bit - 2 * half if bit >= half else bit for bit in bits]
    numbers = torch.tensor(signed, dtype=form.bits).view(real)
    return numbers.view(dtype) if dtype.is_complex else numbers


def _transposed(numbers: Tensor) -> Tensor:
    return numbers.repeat(2).reshape(2, -1).T


def _every_second(numbers: Tensor) -> Tensor:
    return numbers.repeat_interleave(2)[::2]


def _channels_last(numbers: Tensor) -> Tensor:
    return numbers.repeat(2).reshape(1, -1, 1, 2).permute(0, 1, 3, 2)


def _expanded(numbers: Tensor) -> Tensor:
    return numbers.reshape(-1, 1).expand(-1, 3)


def _coo(numbers: Tensor, *, is_coalesced: bool) -> Tensor:
    rows = len(numbers) + 1
    indices = torch.arange(len(numbers)) if is_coalesced else torch.zeros(len(numbers)).long()
    return torch.sparse_coo_tensor(
        indices[None], numbers, (rows,), is_coalesced=is_coalesced, check_invariants=True
    )


def _csr(numbers: Tensor) -> Tensor:
    size = len(numbers)
    return torch.sparse_csr_tensor(
        torch.tensor([0, size]), torch.arange(size), numbers, (1, size), check_invariants=True
    )


_BUILDERS: dict[Layout, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda numbers: numbers,
    "scalar": lambda numbers: numbers[0],
    "empty": lambda numbers: numbers[:0],
    "transposed": _transposed,
    "strided": _every_second,
    "channels_last": _channels_last,
    "expanded": _expanded,
    "coo": lambda numbers: _coo(numbers, is_coalesced=True),
    "coo_uncoalesced": lambda numbers: _coo(numbers, is_coalesced=False),
    "csr": _csr,
}
"""Makes a gradient of each layout out of a flat tensor of at least one number."""

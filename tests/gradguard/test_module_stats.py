"""What is read of a module's call, against the same numbers worked out with NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradguard.sensors.module_stats import add_sums, forward_statistics

VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-3, 300.0, math.nan, math.inf, -math.inf])
SHAPES = st.sampled_from([(4,), (1, 3), (5, 3), (4, 2, 3), (3, 2, 2, 2)])


@st.composite
def filled(draw, shape):
    """Draw a tensor of a few kinds of values, some with all rows the same."""
    size = math.prod(shape)
    values = torch.tensor(draw(st.lists(VALUES, min_size=size, max_size=size))).reshape(shape)
    return values[:1].expand(shape).clone() if draw(st.booleans()) else values


def numbers_of(inputs, output):
    """Return what the guard would report of a call."""
    sums = forward_statistics(nn.Identity(), [inputs], output)
    add_sums([sums])
    return sums.numbers({name: [value.item()] for name, value in sums.values.items()})


def rows_of(tensor):
    """Return (rows, positions, units) in float64, as the readings mean it."""
    values = tensor.double().numpy()
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim >= 4:
        values = values.reshape(*values.shape[:2], -1).swapaxes(1, 2)
    return values.reshape(values.shape[0], -1, values.shape[-1])


def expected(values, side):
    """Return root mean square, spread over the rows and whether something is not finite."""
    found = {
        f"{side}_rms": math.sqrt(np.mean(values**2)),
        f"{side}_nonfinite": int(not np.isfinite(values).all()),
    }
    if len(values) > 1:
        found[f"{side}_row_std"] = math.sqrt(np.mean(np.var(values, axis=0)))
    return found


@given(data=st.data(), shape=SHAPES)
@np.errstate(invalid="ignore")
def test_the_numbers_are_those_of_numpy(data, shape):
    """Every share, extreme, mean square and spread, whatever values and rows there are."""
    inputs, output = data.draw(filled(shape)), data.draw(filled(shape))
    found, values = numbers_of(inputs, output), rows_of(output)
    wanted = expected(values, "output") | expected(rows_of(inputs), "input")
    wanted |= {
        "output_max": values.max(),
        "output_min": values.min(),
        "input_max": np.abs(rows_of(inputs)).max(),
        "zero_fraction": np.mean(values == 0),
        "dead_fraction": np.mean((values == 0).all(axis=(0, 1))),
    }
    if len(values) > 1:
        wanted["constant_fraction"] = np.mean((values == values[:1]).all(axis=0))
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4, nan_ok=True)


@given(
    row=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), count=st.integers(2, 9)
)
def test_equal_rows_have_no_spread_at_all(row, count):
    """The spread over rows that are the same is exactly 0, without rounding."""
    same = torch.tensor([row] * count)
    found = numbers_of(same, same.clone())
    assert found["output_row_std"] == found["input_row_std"] == 0.0
    assert found["constant_fraction"] == 1.0


@given(data=st.data(), shapes=st.lists(SHAPES, min_size=2, max_size=6))
def test_calls_read_together_are_read_as_if_alone(data, shapes):
    """Each call of several, of which some share their kernels, has the numbers it has alone."""
    pairs = [(data.draw(filled(shape)), data.draw(filled(shape))) for shape in shapes]
    alone = [numbers_of(*pair) for pair in pairs]
    together = [forward_statistics(nn.Identity(), [one], other) for one, other in pairs]
    add_sums(together)
    for sums, wanted in zip(together, alone, strict=True):
        found = sums.numbers({name: [value.item()] for name, value in sums.values.items()})
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("rows", [4, 512])
def test_what_is_written_over_later_is_read_as_it_was(rows):
    """A module that works in place on what was read changes nothing, for small and large outputs."""
    output = torch.arange(float(rows * 64)).reshape(rows, 64)
    sums = forward_statistics(nn.Identity(), [output.clone()], output)
    highest = output.max().item() if rows <= 64 else output[:: rows // 64][:64].max().item()
    output.zero_()
    add_sums([sums])
    assert sums.values["output_max"].item() == highest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_in_a_wider_one(dtype):
    """Values whose squares overflow in half precision are read; float64 is rounded to float32."""
    output = torch.full((4, 3), 6e4, dtype=dtype)
    found = numbers_of(output.clone(), output)
    assert found["output_rms"] == pytest.approx(6e4, rel=1e-2)
    assert found["output_nonfinite"] == 0

"""Rows reach the host in order and unchanged, whatever their tensors look like."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gradguard.deferred import DeferredRows

PIECES = st.builds(
    lambda shape, dtype, first: (torch.arange(64.0)[first:][: shape.numel()].view(shape)).to(dtype),
    st.sampled_from([torch.Size(s) for s in ((), (1,), (3,), (2, 3), (0,))]),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.int64, torch.bool]),
    st.integers(0, 50),
)


@given(rows=st.lists(st.lists(PIECES, max_size=6), max_size=12), lag=st.integers(1, 5))
def test_rows_arrive_in_order_with_their_values(rows, lag):
    """Every token comes back once, in order, with the numbers of its tensors one after the other."""
    arrived = []
    queue = DeferredRows(lambda *row: arrived.append(row), lag=lag, max_age_s=1e9)
    for number, pieces in enumerate(rows):
        queue.push(number, pieces)
    queue.flush()
    expected = [[float(x) for piece in pieces for x in piece.reshape(-1)] for pieces in rows]
    assert arrived == list(enumerate(expected))


def test_rows_wait_until_there_are_enough_of_them():
    """With a lag of 3 nothing arrives before the third row, and then all three."""
    arrived = []
    queue = DeferredRows(lambda token, _: arrived.append(token), lag=3, max_age_s=1e9)
    for token in range(2):
        queue.push(token, (torch.ones(()),))
    assert arrived == []
    queue.push(2, (torch.ones(()),))
    assert arrived == [0, 1, 2]

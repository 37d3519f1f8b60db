"""Samples lie at fixed places, spread over the whole tensor, cheap to fetch."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from gradguard.sampling import ParameterSample, sample_quota, sample_runs


@given(values=st.integers(1, 3_000_000), tensors=st.integers(1, 400))
def test_runs_are_even_within_the_quota_and_reach_the_end(values, tensors):
    """Runs of equal length and spacing, no more values than asked for, and little left at the end."""
    quota = sample_quota(values, tensors)
    runs = sample_runs(torch.empty(values), quota)
    assert 0 < sum(map(len, runs)) <= max(quota, 64)
    starts = [run.storage_offset() for run in runs]
    assert len({len(run) for run in runs}) == 1
    gaps = {b - a for a, b in pairwise(starts)}
    assert len(gaps) <= 1
    left = values - starts[-1] - len(runs[-1])
    assert 0 <= left <= 16 * len(runs)


def test_runs_of_large_tensors_begin_where_a_fetch_begins():
    """The runs of a large float32 tensor lie 64 bytes apart or a multiple of it."""
    runs = sample_runs(torch.empty(1344, 448), 1024)
    assert len(runs) == 64
    assert all(run.storage_offset() % 16 == 0 for run in runs)


def test_a_reading_is_not_changed_by_the_next_one():
    """What was taken before a write still shows the old values after the next reading."""
    parameters = [torch.zeros(512, 512), torch.zeros(3), torch.zeros(2048, 64)]
    sample = ParameterSample(parameters, sections=[2, 1], per_tensor=1024, budget=10_000)
    sample.aim([torch.ones_like(p) for p in parameters])
    before = sample.take()
    for parameter in parameters:
        parameter.add_(1)
    after = sample.take()
    assert torch.equal(before, torch.zeros_like(before))
    assert torch.equal(after, torch.ones_like(after))
    assert sum(sample.layout().sections) == len(after)


def test_a_dense_table_is_not_searched_and_others_still_are():
    """Extra positions stand in the tables that are not known to move all over, until told otherwise."""
    parameters = [torch.zeros(2048, 64), torch.zeros(4096, 32)]
    sample = ParameterSample(parameters, sections=[2], per_tensor=256, budget=10_000)
    gradients = [torch.ones_like(p) for p in parameters]

    def samples() -> list[int]:
        sample.aim(gradients)
        assert len(sample.take()) == sum(sample.layout().sections)
        owners = sample.layout().parameters
        return [int((owners == index).sum()) for index in range(2)]

    both = samples()
    sample.set_dense({0})
    assert samples() == [both[0] - 128, both[1]]
    sample.set_dense(())
    assert samples() == both

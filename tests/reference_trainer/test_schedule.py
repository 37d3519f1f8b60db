"""The learning rate schedule: laws of its shape."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.schedule import learning_rate_factor, planned_steps, warmup_cosine

SHAPES = {
    "planned": st.integers(1, 2000),
    "warmup_fraction": st.floats(0.0, 1.0),
    "final_fraction": st.floats(0.0, 1.0),
}


@given(**SHAPES)
def test_it_rises_then_falls_within_its_bounds(
    planned: int, warmup_fraction: float, final_fraction: float
) -> None:
    """Never 0 while warming up, never above 1, rising to the end of the warm-up, then falling."""
    shape = {"warmup_fraction": warmup_fraction, "final_fraction": final_fraction}
    factors = [learning_rate_factor(t, planned=planned, **shape) for t in range(planned)]
    warmup = round(warmup_fraction * planned)
    rising, falling = factors[:warmup], factors[warmup:]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert all(factor > 0.0 for factor in rising)


@given(**SHAPES, beyond=st.integers(0, 100))
def test_it_stays_at_its_end(
    planned: int, warmup_fraction: float, final_fraction: float, beyond: int
) -> None:
    """More steps than planned keep the last factor: nothing rises again."""
    shape = {"warmup_fraction": warmup_fraction, "final_fraction": final_fraction}
    last = learning_rate_factor(planned, planned=planned, **shape)
    assert learning_rate_factor(planned + beyond, planned=planned, **shape) == last


def test_the_shape_of_the_overfit_run() -> None:
    """240 steps: 24 of warm-up from 1/24, the full rate at step 24, one hundredth at the last."""
    shape = {"planned": 240, "warmup_fraction": 0.1, "final_fraction": 0.01}
    assert learning_rate_factor(0, **shape) == 1 / 24
    assert learning_rate_factor(24, **shape) == 1.0
    middle = learning_rate_factor(24 + 215 // 2, **shape)
    assert math.isclose(middle, 0.505, abs_tol=0.004)
    assert math.isclose(learning_rate_factor(239, **shape), 0.01)


@given(
    scenes=st.integers(1, 300),
    batch_scenes=st.integers(1, 80),
    accumulation=st.integers(1, 9),
    epochs=st.integers(1, 4),
)
def test_planned_steps_counts_windows(
    scenes: int, batch_scenes: int, accumulation: int, epochs: int
) -> None:
    """Counting batches and windows one by one gives the same number."""
    windows = 0
    for _ in range(epochs):
        batches = len(range(0, scenes, batch_scenes))
        windows += len(range(0, batches, accumulation))
    got = planned_steps(
        scenes=scenes, batch_scenes=batch_scenes, accumulation=accumulation, epochs=epochs
    )
    assert got == windows


def test_it_scales_every_group_by_its_own_rate() -> None:
    """Backbone and head keep their ratio throughout."""
    backbone, head = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [backbone], "lr": 0.5}, {"params": [head], "lr": 2.0}])
    schedule = warmup_cosine(optimizer, planned=10, warmup_fraction=0.2, final_fraction=0.1)
    for taken in range(10):
        factor = learning_rate_factor(taken, planned=10, warmup_fraction=0.2, final_fraction=0.1)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.5 * factor, 2.0 * factor], rel=1e-12)
        optimizer.step()
        schedule.step()

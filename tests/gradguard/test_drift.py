"""The drift meter against exact arithmetic, and what it must not be fooled by."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradguard as gg
from tests.gradguard.loops import batches, small_net


def moved_by(update, parameters, **options):
    """Return the report of adding ``update[i]`` to parameter i."""
    meter = gg.DriftMeter([(f"p{i}", p) for i, p in enumerate(parameters)], **options)
    meter.mark()
    with torch.no_grad():
        for parameter, step in zip(parameters, update, strict=True):
            parameter.add_(step)
    return meter.read()


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.complex64]),
    exact=st.booleans(),
    seed=st.integers(0, 99),
)
def test_small_parameters_are_measured_exactly(shapes, dtype, exact, seed):
    """Below the sample size sampled and exact readings both equal the true norms."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    update = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    before = [p.clone() for p in parameters]
    report = moved_by(update, parameters, exact=exact)
    for drift, old, new in zip(report.parameters, before, parameters, strict=True):
        assert drift.exact
        assert drift.relative_error == 0.0
        assert drift.update_norm == pytest.approx(float((new - old).norm()), rel=1e-5, abs=1e-12)
        assert drift.weight_norm == pytest.approx(float(old.norm()), rel=1e-5)
    total = math.hypot(*(d.update_norm for d in report.parameters))
    assert report.overall.update_norm == pytest.approx(total)


@given(seed=st.integers(0, 19))
def test_sampled_norms_lie_within_their_stated_error(seed):
    """Five stated standard errors contain the true update norm of a large tensor."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(300, 1000, generator=generator)
    update = (
        torch.randn(300, 1000, generator=generator) * torch.rand(1000, generator=generator) ** 4
    )
    report = moved_by([update], [weight])
    drift = report.overall
    assert not drift.exact
    assert 0 < drift.relative_error < 0.3
    error = abs(drift.update_norm / float(update.norm()) - 1)
    assert error < 5 * drift.relative_error


@pytest.mark.parametrize("sizes", [[3], [1, 2]])
def test_ordinary_and_detailed_sums_agree(sizes):
    """One row per group and one row per parameter give the same whole and the same groups."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(n, generator=generator) for n in (5000, 7, 40_000)]
    named = [(str(i), p) for i, p in enumerate(parameters)]
    meters = [gg.DriftMeter(named, group_sizes=sizes) for _ in range(2)]
    for meter in meters:
        meter.mark()
    for parameter in parameters:
        parameter.mul_(1 + 0.1 * torch.rand(len(parameter), generator=generator))
    reports = [
        meter.layout.report(meter.sums(detailed=detailed).tolist(), detailed=detailed)
        for meter, detailed in zip(meters, (False, True), strict=True)
    ]
    for one, other in zip(
        (reports[0].overall, *reports[0].groups),
        (reports[1].overall, *reports[1].groups),
        strict=True,
    ):
        for field in ("update_norm", "weight_norm", "moved_fraction", "relative_error"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-9)
    assert reports[0].overall.relative_error > 0


def test_groups_add_up_and_keep_their_order():
    """Group readings are the parameters of each group, in order; sizes that do not fit are refused."""
    parameters = [torch.ones(2), torch.ones(3), torch.ones(4)]
    report = moved_by([1.0, 0.0, 2.0], parameters, group_sizes=[1, 2])
    assert [g.update_norm for g in report.groups] == pytest.approx([math.sqrt(2), 4.0])
    assert [g.moved_fraction for g in report.groups] == pytest.approx([1.0, 4 / 7])
    with pytest.raises(ValueError, match="add up to 2, but there are 3"):
        gg.DriftMeter([(str(i), p) for i, p in enumerate(parameters)], group_sizes=[1, 1])


def test_updates_lost_to_bf16_rounding_show_in_the_moved_fraction():
    """Half of the values are too large for the update to register: moved_fraction says one half."""
    weight = torch.cat([torch.full((512,), 64.0), torch.full((512,), 0.01)]).bfloat16()
    report = moved_by([torch.full((1024,), 0.01).bfloat16()], [weight])
    assert report.overall.moved_fraction == 0.5


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced", "expanded_row"])
def test_every_memory_layout_is_sampled_in_place(layout):
    """Views of odd strides are read where they lie; a fallback sample still sees the movement."""
    base = torch.randn(64, 16, 8, 8)
    weight = {
        "transposed": base.flatten(1).t(),
        "channels_last": base.to(memory_format=torch.channels_last),
        "sliced": base[:, ::2],
        "expanded_row": base[:, :, :, :3],
    }[layout]
    report = moved_by([torch.ones(())], [weight])
    assert report.overall.moved_fraction == 1.0
    assert report.overall.update_norm == pytest.approx(math.sqrt(weight.numel()), rel=1e-4)


def test_an_all_zero_weight_has_no_ratio():
    """The update-to-weight ratio of a zero weight is None, not infinity."""
    report = moved_by([torch.ones(3)], [torch.zeros(3)])
    assert report.overall.update_to_weight is None
    assert report.overall.update_norm == pytest.approx(math.sqrt(3))


def test_misuse_is_a_sentence():
    """No parameters, and reading before marking, are refused."""
    with pytest.raises(ValueError, match=r"pass model\.named_parameters"):
        gg.DriftMeter([])
    with pytest.raises(RuntimeError, match="nothing to compare with"):
        gg.DriftMeter([("w", torch.ones(1))]).read()


def test_ema_between_steps_does_not_mask_the_movement():
    """Weights swapped for their average after every step: the record still shows each step's own update."""
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = [p.detach().clone() for p in model.parameters()]
    with gg.watch(model, optimizer, strict=True) as guard:
        for batch in batches(4):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(batch.x), batch.y).backward()
            expected = math.hypot(*(0.1 * float(p.grad.norm()) for p in model.parameters()))
            optimizer.step()
            with torch.no_grad():  # a decay of 1: the swap undoes the step completely
                for parameter, old in zip(model.parameters(), start, strict=True):
                    parameter.copy_(old)
            guard.flush()
            assert guard.log[-1].drift.update_norm == pytest.approx(expected, rel=1e-4)


def test_ema_lag_is_its_own_reading():
    """The lag of torch's AveragedModel equals the relative distance computed by hand, in the record too."""
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    with gg.watch(model, optimizer, averaged=ema, detail_every=1, strict=True) as guard:
        for batch in batches(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(batch.x), batch.y).backward()
            pairs = list(zip(model.parameters(), ema.module.parameters(), strict=True))
            lag = math.hypot(*(float((a - p).detach().norm()) for p, a in pairs))
            norm = math.hypot(*(float(p.detach().norm()) for p, _ in pairs))
            by_call = gg.averaged_lag(model.parameters(), ema.module.parameters())
            assert by_call == pytest.approx(lag / norm, rel=1e-4, abs=1e-9)
            optimizer.step()
            ema.update_parameters(model)
            guard.flush()
            assert guard.log[-1].averaged_lag == pytest.approx(lag / norm, rel=1e-4, abs=1e-9)
    with pytest.raises(ValueError, match="match one to one"):
        gg.averaged_lag(model.parameters(), [])


def test_a_watched_embedding_is_seen_to_move_beside_a_dense_table():
    """A few rows of a large embedding move in every step, and every record says so, early or late."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50_000, 8), nn.Linear(8, 2048))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gg.watch(model, optimizer, detail_every=4, lag=1) as guard:
        for step in range(40):
            tokens = torch.tensor([17 * step + 7, 31 * step + 11])
            model(tokens).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        guard.flush()
        records = [r for r in guard.log if r.parameters is not None]
    assert len(records) >= 10
    for record in records:
        embedding, dense = record.parameters[0].drift, record.parameters[1].drift
        assert 0 < embedding.moved_fraction < 0.5 < dense.moved_fraction


@pytest.mark.parametrize("seed", range(8))
def test_among_hundreds_of_small_tensors_the_whole_lies_within_its_stated_error(seed):
    """One run a tensor is enough where there are many, although rows of a tensor move by different amounts."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.randn(48, 53, generator=generator) for _ in range(200)]
    rows = [torch.rand(48, 1, generator=generator) for _ in parameters]
    update = [row * torch.randn(48, 53, generator=generator) for row in rows]
    overall = moved_by(update, parameters).overall
    exact = math.sqrt(sum(one.square().sum().item() for one in update))
    assert overall.sampled == 200 * 64
    assert overall.update_norm == pytest.approx(exact, rel=overall.relative_error)
    assert overall.relative_error < 0.1

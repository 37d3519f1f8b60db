"""Clipping by the guard: torch's bits, and norms that need no second reading."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradguard as gg
from gradguard import gradient_reader
from gradguard.records import StepOutcome
from gradguard.testing import (
    TrainingRun,
    assert_neutral,
    bits_of,
    count_host_reads,
    parameter_sets,
)
from tests.benchmarks.ris import torch_clipping
from tests.gradguard.loops import batches, make_optimizer, small_net

POISONS = [math.nan, math.inf, -math.inf]


A_NET = small_net()
A_GUARD = gg.watch(A_NET, torch.optim.SGD(A_NET.parameters(), lr=1.0), strict=True)
"""Of another net: what it clips is none of its business."""


def clipped_by_torch(parameters, max_norm, *, leave_nonfinite=False):
    """Clip without the guard."""
    return torch_clipping(list(parameters), max_norm, leave_nonfinite=leave_nonfinite)


class Loop:
    """A small regression under a guard; ``between`` is called with the net after the clipping."""

    def __init__(self, *, between=None, poison=None, **options):
        self.net, self.between = small_net(), between or (lambda net: None)
        self.poison, self.options = poison, {"max_norm": 0.1, **options}
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3)
        self.truth = []

    def run(self, steps=24, *, by_guard=True, **settings):
        """Return the guard's records; ``truth`` has the norm that each step was taken with."""
        settings = {"detail_every": 10, "lag": 2, "strict": True, **settings}
        with gg.watch(self.net, self.optimizer, **settings) as guard:
            clip = guard.clip_grad_norm_ if by_guard else clipped_by_torch
            for number, batch in enumerate(batches(steps, size=8)):
                nn.functional.mse_loss(self.net(batch.x), batch.y).backward()
                if self.poison is not None and number == steps - 5:
                    next(self.net.parameters()).grad.view(-1)[0] = self.poison
                clip(self.net.parameters(), **self.options)
                self.between(self.net)
                held = [p.grad.double().norm() for p in self.net.parameters()]
                self.truth.append(torch.stack(held).norm().item())
                self.optimizer.step()
                self.optimizer.zero_grad()
        return list(guard.log)


@pytest.fixture
def readings(monkeypatch):
    """List the numbers of gradients that are read for their norms, one entry a reading."""
    seen = []
    original = gradient_reader.planned_norms

    def counted(tensors, plan):
        seen.append(len(tensors))
        return original(tensors, plan)

    monkeypatch.setattr(gradient_reader, "planned_norms", counted)
    return seen


@given(
    parameters=parameter_sets(),
    max_norm=st.sampled_from([0.0, 1e-3, 1.0, 1e30, math.inf]),
    norm_type=st.sampled_from([2.0, 1.0, math.inf]),
    foreach=st.sampled_from([None, False]),
)
def test_it_clips_to_the_bits_of_torch(parameters, max_norm, norm_type, foreach):
    """Whatever the gradients hold, they and the norm become what torch's function makes of them."""
    held = [p.grad for p in parameters if p.grad is not None]
    original = [gradient.clone() for gradient in held]
    expected = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, foreach=foreach)
    clipped = [gradient.clone() for gradient in held]
    for gradient, values in zip(held, original, strict=True):
        gradient.copy_(values)
    found = A_GUARD.clip_grad_norm_(parameters, max_norm, norm_type, foreach=foreach)
    for one, other in zip([found, *held], [expected, *clipped], strict=True):
        assert torch.equal(bits_of(one), bits_of(other))


@pytest.mark.parametrize("poison", POISONS)
def test_it_can_leave_alone_what_is_not_finite(poison):
    """With ``leave_nonfinite`` the poison stays where it is, and every other bit too."""
    loop = Loop()
    with gg.watch(loop.net, loop.optimizer, strict=True) as guard:
        pair = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
        pair[0].grad, pair[1].grad = torch.tensor([7.0, poison]), torch.tensor([-3.0, 9.0])
        assert not guard.clip_grad_norm_(pair, 1.0, leave_nonfinite=True).isfinite()
    assert torch.equal(bits_of(pair[0].grad), bits_of(torch.tensor([7.0, poison])))
    assert torch.equal(pair[1].grad, torch.tensor([-3.0, 9.0]))


def test_it_raises_for_a_nonfinite_norm_as_torch_does():
    """With ``error_if_nonfinite`` the error is torch's, and no gradient was touched."""
    loop, one = Loop(), nn.Parameter(torch.zeros(2))
    one.grad = torch.tensor([1.0, math.inf])
    with (
        gg.watch(loop.net, loop.optimizer, strict=True) as guard,
        pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped"),
    ):
        guard.clip_grad_norm_(one, 0.5, error_if_nonfinite=True)
    assert torch.equal(one.grad, torch.tensor([1.0, math.inf]))


def test_one_reading_serves_the_clipping_and_the_step(readings):
    """Only detailed steps and those before the first record are read again; every norm is right."""
    loop = Loop()
    records = loop.run()
    assert [r.gradient_norm for r in records] == pytest.approx(loop.truth, rel=1e-5)
    assert all(r.gradient_norm_before_clipping > r.gradient_norm for r in records)
    assert len(readings) < 10
    readings.clear()
    Loop().run(by_guard=False)
    assert len(readings) == 24


WRITES = {
    "in place": lambda net: [p.grad.mul_(0.5) for p in net.parameters()],
    "one value of one": lambda net: net[0].weight.grad[0, 0].fill_(3.0),
    "foreach": lambda net: torch._foreach_mul_([p.grad for p in net.parameters()], 0.5),
    "another tensor": lambda net: setattr(net[0].weight, "grad", net[0].weight.grad * 0.5),
    "through data": lambda net: [p.grad.data.mul_(0.5) for p in net.parameters()],
    "through numpy": lambda net: net[0].weight.grad.numpy().fill(3.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_gradients_that_change_after_the_clipping_are_read_again(write):
    """However they are written to in every step, each record has the norm of its own step."""
    loop = Loop(between=WRITES[write])
    records = loop.run()
    assert [r.gradient_norm for r in records] == pytest.approx(loop.truth, rel=1e-5)


def test_a_write_that_torch_does_not_count_is_noticed_on_the_next_detailed_step():
    """A change through ``.data`` that begins late is missed until a detailed step shows it, and never again."""
    steps = iter(range(40))
    halve = WRITES["through data"]
    loop = Loop(between=lambda net: halve(net) if next(steps) >= 15 else None)
    records = loop.run(40, lag=1)
    right = [
        r.gradient_norm == pytest.approx(t, rel=1e-5)
        for r, t in zip(records, loop.truth, strict=True)
    ]
    assert all(right[:15])
    assert not any(right[15:20])  # the price, as documented
    assert all(right[22:])


@pytest.mark.parametrize("leave_nonfinite", [True, False])
@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_step_is_told_as_with_torchs_own_clipping(poison, leave_nonfinite):
    """Outcome, and which gradients are not finite, do not depend on who clipped."""
    ours = Loop(poison=poison, leave_nonfinite=leave_nonfinite).run()
    theirs = Loop(poison=poison, leave_nonfinite=leave_nonfinite).run(by_guard=False)
    if leave_nonfinite:
        assert ours[19].nonfinite_tensors == 1
    assert [r.outcome for r in ours] == [r.outcome for r in theirs]
    assert [r.nonfinite_tensors for r in ours] == [r.nonfinite_tensors for r in theirs]
    assert [r.first_nonfinite for r in ours] == [r.first_nonfinite for r in theirs]
    assert ours[19].outcome is StepOutcome.CORRUPTED


@pytest.mark.parametrize("optimizer_name", ["sgd-default", "adamw-fused"])
@pytest.mark.parametrize("unscaled", [True, False])
def test_a_clipping_before_unscaling_is_not_taken_for_the_step(optimizer_name, unscaled):
    """The recorded norm is that of the unscaled gradients, wherever the clipping came."""
    net, truth = small_net(), []
    optimizer = make_optimizer(optimizer_name, net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gg.watch(net, optimizer, scaler=scaler, detail_every=10, lag=1, strict=True) as guard:
        for batch in batches(24, size=8):
            scaler.scale(nn.functional.mse_loss(net(batch.x), batch.y)).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            guard.clip_grad_norm_(net.parameters(), 0.1)
            held = torch.stack([p.grad.double().norm() for p in net.parameters()]).norm().item()
            truth.append(held if unscaled else held / 1024.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert [r.gradient_norm for r in guard.log] == pytest.approx(truth, rel=1e-4)


def test_every_optimizer_has_the_norms_of_its_own_clipping(readings):
    """Two optimizers that are clipped before either steps share nothing but the guard."""
    nets = {"one": small_net(seed=1), "two": small_net(seed=2)}
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=1e-3) for name, net in nets.items()}
    whole, before = nn.ModuleDict(nets), {"one": [], "two": []}
    with gg.watch(whole, optimizers, detail_every=20, lag=1, strict=True) as guard:
        for batch in batches(19, size=8):
            for name, net in nets.items():
                nn.functional.mse_loss(net(batch.x), batch.y).backward()
                norm = guard.clip_grad_norm_(net.parameters(), 0.1 if name == "one" else 0.2)
                before[name].append(norm.item())
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
    for name, limit in (("one", 0.1), ("two", 0.2)):
        own = [r for r in guard.log if r.optimizer == name]
        assert [r.gradient_norm_before_clipping for r in own] == pytest.approx(before[name])
        assert [r.gradient_norm for r in own] == pytest.approx(
            [min(limit, norm) for norm in before[name]], rel=1e-4
        )
    assert len(readings) < 2 * 7


@pytest.mark.parametrize("optimizer_name", ["sgd-default", "adamw-foreach", "adamw-fused"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_clipped_by_the_guard_has_the_bits_of_one_clipped_by_torch(optimizer_name, precision):
    """25 steps end in identical weights, states and random state."""

    def make_run():
        net = small_net(dropout=0.3)
        optimizer = make_optimizer(optimizer_name, net.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=precision == "fp16")
        data = iter(batches(25, size=8))

        def step(guard):
            batch = next(data)
            with torch.autocast("cpu", dtype=torch.float16, enabled=precision == "fp16"):
                loss = nn.functional.mse_loss(net(batch.x).float(), batch.y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip = nn.utils.clip_grad_norm_ if guard is None else guard.clip_grad_norm_
            clip(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return TrainingRun(model=net, optimizers=optimizer, step=step, scaler=scaler)

    def observe(run):
        return gg.watch(
            run.model, run.optimizers, scaler=run.scaler, detail_every=10, lag=2, strict=True
        )

    assert_neutral(make_run, observe)


def test_the_clipping_reads_nothing_on_the_host():
    """Clipping by the guard and stepping add no host read to those of torch's clipping."""
    counts = [
        count_host_reads(lambda by_guard=by_guard: Loop().run(by_guard=by_guard))
        for by_guard in (True, False)
    ]
    assert counts[0].total() <= counts[1].total()

"""The device back end: the verdict stays on the device, and is the one the host would have reached."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradguard.gate import StepGate
from gradguard.policies import AnySignal, Finite, LossSpike, NormSpike
from gradguard.testing.lint import assert_no_host_reads
from gradguard.verdicts import GateCeilingError
from tests.gradguard.gate_cases import FUSED, Case, backward, bits, loss_of, snapshot

ADAMW = Case("AdamW", {"fused": True})
ALL_POLICIES = (Finite(), AnySignal(), NormSpike(warmup=3), LossSpike(warmup=3))

sizes = st.sampled_from([0.0, 1e-14, 1.0, 1.1, 3.0, 100.0, math.nan, math.inf, -math.inf])
losses = st.sampled_from([None, -5.0, 0.0, 1.0, 1.2, 50.0, math.nan, math.inf, -math.inf])


def run(backend, steps, make=lambda weight: torch.optim.AdamW([weight], fused=True)):
    """Step once per (gradient, loss); return decisions, weight and optimizer state."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = make(weight)
    gate = StepGate(optimizer, ALL_POLICIES, backend=backend, max_consecutive=99, rate_window=99)
    for size, loss in steps:
        weight.grad = torch.full((3,), size)
        if loss is not None:
            gate.observe(loss=loss)
        optimizer.step()
    gate.flush()
    return gate, bits((weight, optimizer.state_dict()))


@pytest.mark.filterwarnings("ignore:LossSpike has no loss")
@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(sizes, losses), min_size=1, max_size=20))
def test_both_back_ends_decide_alike(steps):
    """For any gradients and losses the device decides as the host does, with the same reasons."""
    (device, device_end), (host, host_end) = run("device", steps), run("hide", steps)
    assert list(map(repr, device.decisions)) == list(map(repr, host.decisions))
    assert device_end == host_end
    assert device.counts == host.counts


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_no_host_read_per_step(case):
    """Judging, learning, vetoing and counting read nothing on the host, scaler or not."""
    for scaled in (True, False):
        model = case.model()
        optimizer = case.optimizer(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        gate = StepGate(optimizer, ALL_POLICIES, lag=1000)

        def step(index, poison=1.0, o=optimizer, m=model, s=scaler, g=gate):
            o.zero_grad()
            loss = loss_of(m, index, factor=poison)
            g.observe(loss=loss)
            s.scale(loss).backward()
            s.step(o)
            s.update()

        step(0)
        assert_no_host_reads(lambda: [step(i, p) for i, p in enumerate((1.0, 0.0, math.nan))])
        assert gate.counts.unread >= 3
        gate.flush()
        assert gate.counts.unread == 0
        assert gate.counts.vetoed == (1 if scaled else 2)  # the scaler skips NaN by itself


def test_the_flag_of_this_step_is_at_hand():
    """veto_flag is a 0-dim 0 or 1 for the current step, and None where the host decided."""
    model = ADAMW.model()
    gate = StepGate(optimizer := ADAMW.optimizer(model))
    flags = []
    for index, factor in enumerate([1.0, 1.0, math.nan, 1.0]):
        backward(model, optimizer, index, factor)
        optimizer.step()
        flags.append(gate.veto_flag)
    assert flags[0] is None  # the first step creates state: decided on the host
    assert [(float(f), f.shape) for f in flags[1:]] == [(0.0, ()), (1.0, ()), (0.0, ())]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_late_parameters_of_fused_sgd_are_vetoed_without_traces(momentum):
    """A group that gets its first gradient late is vetoed without leaving uninitialised momentum."""
    early, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [early]}, {"params": [late]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=momentum, fused=True)
    gate = StepGate(optimizer)
    early.grad = torch.ones(3)
    optimizer.step()
    late.grad = torch.full((3,), math.nan)
    before = snapshot(nn.ParameterList([early, late]), optimizer)
    optimizer.step()
    gate.flush()
    assert snapshot(nn.ParameterList([early, late]), optimizer) == before
    assert gate.counts.vetoed == 1


def test_decisions_come_in_order_and_late():
    """Decisions are read in batches of ``lag``, and each belongs to its attempt."""
    model = ADAMW.model()
    gate = StepGate(optimizer := ADAMW.optimizer(model), lag=4)
    known = []
    for index in range(10):
        backward(model, optimizer, index, math.nan if index in (3, 7) else 1.0)
        optimizer.step()
        known.append(len(gate.decisions))
    assert known == [1, 1, 1, 1, 5, 5, 5, 5, 9, 9]
    assert gate.decision(9) is None
    gate.flush()
    assert [gate.decision(i).allowed for i in range(10)] == [i not in (3, 7) for i in range(10)]
    assert "first in parameter 0 of group 0" in gate.decision(7).reason


def test_decisions_stay_in_order_when_the_back_end_changes():
    """A step that goes through the host, for a late parameter, first reads what is still waiting."""
    early, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    gate = StepGate(optimizer := torch.optim.AdamW([early, late], fused=True))
    for gradient in (1.0, math.nan, 1.0):
        early.grad = torch.full((2,), gradient)
        late.grad = torch.ones(2) if optimizer.state and gradient == 1.0 else None
        optimizer.step()
    assert gate.veto_flag is None
    assert [d.allowed for d in gate.decisions] == [True, False, True]


def test_ceilings_are_checked_late():
    """Too many vetoes in a row raise within ``lag`` steps, before the step that finds out."""
    model = ADAMW.model()
    optimizer = ADAMW.optimizer(model)
    StepGate(optimizer, max_consecutive=3, lag=4)
    backward(model, optimizer, 0)
    optimizer.step()
    before = snapshot(model, optimizer)
    bad_steps = []

    def step_on_bad_batches():
        while len(bad_steps) < 12:
            backward(model, optimizer, len(bad_steps), math.nan)
            optimizer.step()
            bad_steps.append(len(bad_steps))

    with pytest.raises(GateCeilingError, match=r"4 in a row \(max_consecutive=3\)"):
        step_on_bad_batches()
    assert 4 <= len(bad_steps) <= 3 + 4
    assert snapshot(model, optimizer) == before
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("leave", ["flush", "exit"])
def test_ceilings_passed_at_the_end_are_not_lost(leave):
    """The last decisions are read when the block ends or on flush, and raise there; detach is silent."""
    model = ADAMW.model()
    optimizer = ADAMW.optimizer(model)
    gate = StepGate(optimizer, max_consecutive=1, lag=100)
    for index in range(4):
        backward(model, optimizer, index, 1.0 if index == 0 else math.nan)
        optimizer.step()
    with pytest.raises(GateCeilingError):
        gate.flush() if leave == "flush" else gate.__exit__(None, None, None)
    gate.detach()
    assert gate.counts.vetoed == 3


def test_overflowing_norms_are_vetoed_on_the_device():
    """The device back end cannot count entries, and vetoes a norm that overflows (documented)."""
    weight = nn.Parameter(torch.ones(4))
    gate = StepGate(optimizer := torch.optim.SGD([weight], lr=1e-25, fused=True), [Finite()])
    weight.grad = torch.full((4,), 1e25)
    optimizer.step()
    gate.flush()
    assert gate.last_decision.policy == "Finite"


def test_scaler_flags_that_count_devices_do_not_hurt_step_counters():
    """A found_inf of 2 (two devices) is merged as 1: Adam's step counter subtracts it."""
    weight = nn.Parameter(torch.ones(2))
    gate = StepGate(optimizer := torch.optim.AdamW([weight], fused=True))
    for flag in (None, torch.tensor(2.0), torch.ones(1)):
        weight.grad = torch.ones(2)
        if flag is not None:
            optimizer.found_inf = flag
        optimizer.step()
        if flag is not None:
            del optimizer.found_inf
    gate.flush()
    assert optimizer.state[weight]["step"] == 1
    assert gate.counts.left_to_scaler == 2


def test_a_loss_policy_without_loss_abstains_and_says_so():
    """Without observe() LossSpike warns once, counts, and vetoes nothing."""
    model = ADAMW.model()
    gate = StepGate(optimizer := ADAMW.optimizer(model), [LossSpike()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(3):
            backward(model, optimizer, index)
            optimizer.step()
    gate.flush()
    assert ["LossSpike has no loss to judge" in str(w.message) for w in caught] == [True]
    assert (gate.counts.abstained, gate.counts.allowed) == ({"LossSpike": 3}, 3)
    assert gate.last_decision.loss is None


@pytest.fixture
def sync_debug_mode():
    """Hand out torch's switch for its sync check and turn it off afterwards."""
    yield torch.cuda.set_sync_debug_mode
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_cuda_steps_never_wait(case, sync_debug_mode):
    """On CUDA the device back end passes torch's own sync check, and still vetoes the bad steps."""
    model = case.model().cuda()
    optimizer = case.optimizer(model)
    gate = StepGate(optimizer, ALL_POLICIES, lag=4)
    x = torch.randn(6, 4, device="cuda")
    poisons = torch.ones(20, device="cuda")
    poisons[[0, 5, 6]] = math.nan
    moved = []
    for index in range(20):
        sync_debug_mode("default" if index < 2 else "error")  # until there is optimizer state
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = model(x).square().mean()
        gate.observe(loss=loss)
        (loss * poisons[index]).backward()
        optimizer.step()
        changed = [(p != b).any() for p, b in zip(model.parameters(), before, strict=True)]
        moved.append(torch.stack(changed).any())
    sync_debug_mode("default")
    gate.flush()
    assert torch.stack(moved).tolist() == [i not in (0, 5, 6) for i in range(20)]
    assert [d.allowed for d in gate.decisions] == [i not in (0, 5, 6) for i in range(20)]

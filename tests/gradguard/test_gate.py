"""What a veto is: which steps a gate stops, for every optimizer, and what it leaves untouched."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradguard.gate import StepGate
from gradguard.policies import AnySignal, Finite, LossSpike, NormSpike
from gradguard.testing.lint import count_host_reads
from tests.gradguard.gate_cases import (
    CASES,
    OPTIONS,
    PLAIN,
    REFUSED,
    Case,
    backward,
    bits,
    loss_of,
    snapshot,
    torch_optimizers,
)

POISONS = {0: math.nan, 5: math.inf, 6: 0.0}


def test_every_optimizer_of_torch_is_gated_or_refused():
    """No optimizer of the installed torch is missing from the tests of the gate."""
    assert torch_optimizers() <= OPTIONS.keys() | set(REFUSED)


@pytest.mark.parametrize("backend", ["auto", "hide"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gated_run_equals_a_run_that_never_stepped_on_bad_batches(case, backend):
    """14 steps with 3 poisoned batches end as if those had never been stepped on, bit for bit."""
    runs = {}
    for gated in (True, False):
        model = case.model()
        optimizer = case.optimizer(model)
        gate = StepGate(optimizer, backend=backend) if gated else None
        trace = runs[gated] = []
        for index in range(14):
            backward(model, optimizer, index, POISONS.get(index, 1.0))
            if gated or index not in POISONS:
                optimizer.step()
            trace.append(snapshot(model, optimizer))
        if gate is not None:
            gate.flush()
            assert [d.allowed for d in gate.decisions] == [i not in POISONS for i in range(14)]
            assert gate.counts.by_policy == {"Finite": 2, "AnySignal": 1}
    assert runs[True] == runs[False]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_vetoed_step_keeps_gradients_weights_and_state(case):
    """A veto changes no parameter, no optimizer state and no gradient tensor, not even its identity."""
    model = case.model()
    optimizer = case.optimizer(model)
    with StepGate(optimizer):
        backward(model, optimizer, 0)
        optimizer.step()
        backward(model, optimizer, 1, math.nan)
        gradients = [p.grad for p in model.parameters()]
        before, grads = snapshot(model, optimizer), bits(gradients)
        optimizer.step()
        assert snapshot(model, optimizer) == before
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert bits(gradients) == grads


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gate_is_neutral_on_clean_steps(case):
    """On good batches training with a gate of every policy is training without it, bit for bit."""
    policies = (Finite(), AnySignal(), NormSpike(), LossSpike())
    ends = []
    for gated in (True, False):
        model = case.model()
        optimizer = case.optimizer(model)
        gate = StepGate(optimizer, policies) if gated else None
        for index in range(10):
            loss = backward(model, optimizer, index)
            if gate is not None:
                gate.observe(loss=loss)
            optimizer.step()
        ends.append((snapshot(model, optimizer), torch.get_rng_state().tolist()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_reason_names_policy_count_and_parameter(poison):
    """A veto says which policy objected, to how many gradients, and which parameter came first."""
    model = PLAIN.model()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    gate = StepGate(optimizer)
    backward(model, optimizer, 0)
    model[2].weight.grad[1, 1] = poison
    optimizer.step()
    decision = gate.last_decision
    assert (decision.allowed, decision.policy) == (False, "Finite")
    assert decision.reason == "1 gradient holds NaN or Inf, first in '2.weight' of shape (3, 6)"
    assert not math.isfinite(decision.gradient_norm)


def test_reason_without_parameter_names_gives_group_and_position():
    """Without names in the optimizer a bad gradient is named by group, position and shape."""
    model = PLAIN.model()
    groups = [{"params": list(m.parameters())} for m in (model[0], model[2])]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    gate = StepGate(optimizer)
    backward(model, optimizer, 0)
    model[2].bias.grad[0] = math.nan
    optimizer.step()
    assert gate.last_decision.reason.endswith("first in parameter 1 of group 1, of shape (3,)")


def test_a_norm_that_overflows_is_not_a_nonfinite_gradient():
    """Finite gradients of 1e25 have an infinite float32 norm and are still finite: no veto."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1e-25)
    gate = StepGate(optimizer)
    weight.grad = torch.full((4,), 1e25)
    optimizer.step()
    assert gate.last_decision.allowed
    assert gate.last_decision.gradient_norm == math.inf
    assert weight.abs().max() < 1e-6


def test_one_group_without_signal_is_no_reason_to_skip():
    """AnySignal looks at all parameter groups together."""
    dead, live = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [dead]}, {"params": [live]}], lr=0.1)
    gate = StepGate(optimizer)
    dead.grad, live.grad = torch.zeros(2), torch.ones(2)
    optimizer.step()
    assert gate.last_decision.allowed
    assert live[0] != 1


def test_a_step_without_any_gradient_is_left_alone():
    """With no gradient anywhere there is nothing to judge, nothing to count as a veto."""
    model = PLAIN.model()
    gate = StepGate(optimizer := PLAIN.optimizer(model))
    optimizer.step()
    assert (gate.counts.no_gradient, gate.counts.vetoed, gate.attempts) == (1, 0, 1)
    assert gate.last_decision.gradient_norm is None


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_sparse_gradients_are_judged(poison):
    """A bad value among the stored values of a sparse gradient is seen."""
    case = Case("SparseAdam", {})
    model = case.model()
    gate = StepGate(optimizer := case.optimizer(model))
    backward(model, optimizer, 0, poison)
    before = snapshot(model, optimizer)
    optimizer.step()
    assert gate.last_decision.policy == "Finite"
    assert snapshot(model, optimizer) == before


@pytest.mark.parametrize("part", [complex(0, math.nan), complex(math.inf, 0)])
def test_complex_gradients_are_judged_by_component(part):
    """A bad real or imaginary part is seen, and the complex gradient comes back."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    gate = StepGate(optimizer := torch.optim.Adam([weight]))
    weight.grad = gradient = torch.tensor([1 + 1j, 2.0, part])
    optimizer.step()
    assert gate.last_decision.policy == "Finite"
    assert weight.grad is gradient
    assert torch.equal(weight, torch.ones(3, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_judged(dtype):
    """A float16 gradient whose norm exceeds float16 is fine, a NaN is not, in every precision."""
    weight = nn.Parameter(torch.ones(5000, dtype=dtype))
    gate = StepGate(optimizer := torch.optim.SGD([weight], lr=1e-4))
    weight.grad = torch.full((5000,), 1000.0, dtype=dtype)
    optimizer.step()
    assert gate.last_decision.gradient_norm == pytest.approx(1000 * 5000**0.5, rel=1e-3)
    weight.grad[7] = math.nan
    optimizer.step()
    assert [d.allowed for d in gate.decisions] == [True, False]


def test_accumulation_judges_the_whole_window():
    """One bad micro-batch out of four costs the window: the step over their sum is vetoed."""
    model = PLAIN.model()
    gate = StepGate(optimizer := PLAIN.optimizer(model))
    before = bits(model.state_dict())
    for micro in range(4):
        loss_of(model, micro, factor=math.nan if micro == 2 else 0.25).backward()
    optimizer.step()
    assert bits(model.state_dict()) == before
    assert (gate.attempts, gate.counts.vetoed) == (1, 1)


def test_hidden_gradients_can_be_read_while_they_are_hidden():
    """Between the gate's hooks the gradients are found by id, and .grad is None."""
    model = PLAIN.model()
    gate = StepGate(optimizer := PLAIN.optimizer(model))
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            (gate.is_hiding, dict(gate.hidden_gradients()), model[0].weight.grad)
        )
    )
    backward(model, optimizer, 0, math.nan)
    gradients = {id(p): p.grad for p in model.parameters()}
    optimizer.step()
    assert seen == [(True, gradients, None)]
    assert (gate.is_hiding, dict(gate.hidden_gradients()), gate.veto_flag) == (False, {}, None)


@pytest.mark.parametrize(("factor", "reads"), [(1.0, 1), (0.0, 1), (math.nan, 2)])
def test_the_hide_back_end_reads_once(factor, reads):
    """One host read decides a step; a second one is made only where a norm is not finite."""
    model = PLAIN.model()
    StepGate(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    backward(model, optimizer, 0, factor)
    assert count_host_reads(optimizer.step) == {"Tensor.tolist": reads}

"""A gate among the others: schedulers, loss scalers, other gates, exceptions, copies, misuse."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from gradguard.gate import StepGate
from gradguard.policies import AnySignal, Finite
from tests.gradguard.gate_cases import PLAIN, Case, backward, bits, loss_of, snapshot

# --- schedulers, scalers, other gates ---------------------------------------------------------------


@pytest.mark.parametrize("gate_first", [True, False])
def test_schedulers_before_and_after_stay_legal(gate_first):
    """A scheduler advances as without a gate and does not warn, though the first step is vetoed."""
    model = PLAIN.model()
    optimizer = PLAIN.optimizer(model)
    build = [lambda: torch.optim.lr_scheduler.StepLR(optimizer, 1), lambda: StepGate(optimizer)]
    made = [make() for make in (reversed(build) if gate_first else build)]
    scheduler = made[1] if gate_first else made[0]
    rates = []
    for index in range(3):
        backward(model, optimizer, index, math.nan if index == 0 else 1.0)
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-4, 1e-5])


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("backend", ["auto", "hide"])
def test_the_loss_scaler_keeps_its_own_skips(explicit, fused, backend):
    """NaN is the scaler's business (the scale backs off); a veto leaves scale and protocol alone."""
    case = Case("AdamW", {"fused": fused})
    model = case.model()
    optimizer = case.optimizer(model)
    gate = StepGate(optimizer, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales, moved = [], []
    for index, factor in enumerate([1.0, math.nan, 0.0, 1.0]):
        optimizer.zero_grad()
        before = bits(model.state_dict())
        scaler.scale(loss_of(model, index, factor=factor)).backward()
        if explicit:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(bits(model.state_dict()) != before)
    gate.flush()
    assert scales == [1024.0, 512.0, 512.0, 512.0]
    assert moved == [True, False, False, True]
    assert (gate.counts.allowed, gate.counts.vetoed) == (2, 1)
    assert gate.counts.left_to_scaler == (1 if fused else 0)  # unfused: step() is never called
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("fused", [True, False])
def test_the_norm_is_unscaled(fused):
    """The norm that is judged does not depend on the loss scale, whoever unscales and when."""
    norms = []
    for scale in (None, 4096.0):
        case = Case("SGD", {"fused": fused})
        model = case.model()
        gate = StepGate(optimizer := case.optimizer(model))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        scaler.scale(loss_of(model, 0)).backward()
        scaler.step(optimizer)
        scaler.update()
        gate.flush()
        norms.append(gate.last_decision.gradient_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.parametrize("backend", ["auto", "hide"])
@pytest.mark.parametrize(("fused", "scale"), [(False, 1.4e-45), (False, 1e-39), (True, 0.0)])
def test_a_collapsed_scale_is_caught(fused, scale, backend):
    """Unscaling by a collapsed scale writes NaN or Inf with found_inf = 0; the gate vetoes the step."""
    for gated in (True, False):
        case = Case("SGD", {"fused": fused})
        model = case.model()
        optimizer = case.optimizer(model)
        gate = StepGate(optimizer, backend=backend) if gated else None
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss_of(model, 0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(p.isfinite().all() for p in model.parameters()) is gated
        if gate is not None:
            gate.flush()
            assert gate.last_decision.policy == "Finite"


def test_fused_momentum_survives_a_skipped_first_step():
    """A scaler that skips the first step leaves torch's fused SGD no uninitialised momentum."""
    ends = []
    for fused in (True, False):
        weight = nn.Parameter(torch.ones(64, 64))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with StepGate(optimizer):
            for factor in (math.inf, 0.5, 0.25):
                optimizer.zero_grad()
                scaler.scale((weight * factor).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
                if factor == math.inf:
                    assert not optimizer.state
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "backends", [("hide", "hide"), ("auto", "hide"), ("hide", "auto"), ("auto",) * 2]
)
def test_two_gates_work_together(backends):
    """Each of two gates can veto, and nothing of either is left behind."""
    case = Case("AdamW", {"fused": True})
    model = case.model()
    optimizer = case.optimizer(model)
    finite = StepGate(optimizer, [Finite()], backend=backends[0])
    signal = StepGate(optimizer, [AnySignal()], backend=backends[1])
    moved = []
    for index, factor in enumerate([1.0, math.nan, 0.0, 1.0]):
        backward(model, optimizer, index, factor)
        before = bits(model.state_dict())
        optimizer.step()
        moved.append(bits(model.state_dict()) != before)
        assert all(p.grad is not None for p in model.parameters())
        assert not hasattr(optimizer, "found_inf")
    finite.flush()
    signal.flush()
    assert moved == [True, False, False, True]
    assert (finite.counts.vetoed, signal.counts.vetoed) == (1, 1)


# --- nested steps, exceptions, life cycle -------------------------------------------------------------


class Stubborn(torch.optim.AdamW):
    """Calls ``super().step()``, so its hooks run twice, and can be told to fail."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise MemoryError("no room for the update")
        return super().step(closure)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_calls_super_is_judged_once(fused):
    """Hooks of both classes run for one step of a subclass: one attempt, one verdict."""
    model = PLAIN.model()
    PLAIN.optimizer(model)  # makes torch patch AdamW.step, which makes the inner hooks run
    optimizer = Stubborn(model.parameters(), fused=fused)
    gate = StepGate(optimizer)
    for index, factor in enumerate([1.0, math.nan]):
        backward(model, optimizer, index, factor)
        before = snapshot(model, optimizer)
        optimizer.step()
        assert (snapshot(model, optimizer) == before) is (index == 1)
    gate.flush()
    assert (gate.attempts, gate.counts.vetoed) == (2, 1)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("factor", [1.0, math.nan])
def test_an_exception_inside_a_step_does_not_derail_the_gate(fused, factor):
    """After a step that raised, vetoed or not, the next ones are judged as ever."""
    model = PLAIN.model()
    PLAIN.optimizer(model)
    optimizer = Stubborn(model.parameters(), fused=fused)
    gate = StepGate(optimizer)
    backward(model, optimizer, 0)
    optimizer.step()
    backward(model, optimizer, 1, factor)
    optimizer.fails = True
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.fails = False
    for index, poison in ((2, 1.0), (3, math.nan)):
        backward(model, optimizer, index, poison)
        before = bits(model.state_dict())
        optimizer.step()
        assert (bits(model.state_dict()) != before) is (index == 2)
    gate.flush()
    assert gate.attempts == 4
    assert not hasattr(optimizer, "found_inf")


def test_gradients_of_a_vetoed_step_that_raised_come_back_on_request():
    """restore() brings them back; a retried step is judged on them again."""
    model = PLAIN.model()
    gate = StepGate(optimizer := Stubborn(model.parameters()))
    backward(model, optimizer, 0, math.nan)
    gradients = [p.grad for p in model.parameters()]
    optimizer.fails = True
    for recover in (gate.restore, lambda: None):
        with pytest.raises(MemoryError):
            optimizer.step()
        recover()
    optimizer.fails = False
    optimizer.step()
    assert [d.allowed for d in gate.decisions] == [False] * 3
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_old_gradients_never_replace_new_ones():
    """A new backward pass after a step that raised wins over what was hidden."""
    model = PLAIN.model()
    gate = StepGate(optimizer := Stubborn(model.parameters()))
    backward(model, optimizer, 0, math.nan)
    optimizer.fails = True
    with pytest.raises(MemoryError):
        optimizer.step()
    backward(model, optimizer, 1)
    gradients = bits([p.grad for p in model.parameters()])
    gate.restore()
    assert bits([p.grad for p in model.parameters()]) == gradients


def test_detaching_removes_every_trace():
    """After the block, even one left by an exception, the optimizer has no hook and is not gated."""
    model = PLAIN.model()
    optimizer = PLAIN.optimizer(model)
    with pytest.raises(ZeroDivisionError), StepGate(optimizer) as gate:
        raise ZeroDivisionError
    gate.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    backward(model, optimizer, 0, math.nan)
    optimizer.step()
    assert gate.attempts == 0


def test_copies_of_a_gated_optimizer_are_not_gated():
    """A deep copy or a pickle of the optimizer works and carries no gate."""
    model = PLAIN.model()
    gate = StepGate(optimizer := PLAIN.optimizer(model))
    for duplicate in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        duplicate.step()
    assert gate.attempts == 0


def test_a_gate_does_not_keep_a_dropped_optimizer():
    """Optimizer, model and gate are freed together when nobody holds them."""
    model = PLAIN.model()
    optimizer = PLAIN.optimizer(model)
    StepGate(optimizer)
    reference = weakref.ref(optimizer)
    del optimizer, model
    gc.collect()
    assert reference() is None


# --- refusals ---------------------------------------------------------------------------------------


def test_lbfgs_is_refused():
    """LBFGS makes its gradients inside the step: a clear refusal."""
    with pytest.raises(TypeError, match="LBFGS optimizer: its gradients come from the closure"):
        StepGate(torch.optim.LBFGS(PLAIN.model().parameters()))


def test_a_step_with_a_closure_is_refused():
    """The gate says why it cannot judge step(closure), given either way; closure=None is fine."""
    model = PLAIN.model()
    gate = StepGate(optimizer := PLAIN.optimizer(model))
    before = bits(model.state_dict())
    with pytest.raises(RuntimeError, match="cannot judge"):
        optimizer.step(lambda: loss_of(model, 0))
    with pytest.raises(RuntimeError, match="cannot judge"):
        optimizer.step(closure=lambda: loss_of(model, 0))
    assert bits(model.state_dict()) == before
    optimizer.step(closure=None)
    assert gate.attempts == 1


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"policies": ()}, TypeError, "expected one or more policies"),
        ({"policies": ["finite"]}, TypeError, "expected one or more policies"),
        ({"backend": "gpu"}, ValueError, "backend='gpu'"),
        ({"backend": "device"}, ValueError, "made with fused=True"),
        ({"max_consecutive": 0}, ValueError, "max_consecutive=0"),
        ({"max_veto_rate": math.nan}, ValueError, "max_veto_rate=nan"),
        ({"rate_window": 0}, ValueError, "rate_window=0"),
        ({"lag": 0}, ValueError, "lag=0"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(options, error, sentence):
    """A wrong option says what came and what was expected, and leaves no hook behind."""
    optimizer = PLAIN.optimizer(PLAIN.model())
    with pytest.raises(error, match=sentence):
        StepGate(optimizer, **options)
    assert not optimizer._optimizer_step_pre_hooks


def test_something_that_is_no_optimizer_is_refused():
    """A model in place of the optimizer is an error that says what was expected."""
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        StepGate(nn.Linear(1, 1))


def test_a_loss_with_many_elements_is_refused():
    """observe() asks for one number and says how to get it."""
    gate = StepGate(PLAIN.optimizer(PLAIN.model()))
    with pytest.raises(ValueError, match=r"shape \(3,\); reduce it first"):
        gate.observe(loss=torch.ones(3))

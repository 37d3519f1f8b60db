"""Armed probes listen to one real training step and change nothing in it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode

from gradguard.explain import ArmedProbes
from gradguard.explain.cuts import CutLedger
from gradguard.explain.readings import FlagRoll
from tests.gradguard.explain.places import found, marked


class Net(nn.Module):
    """A cut, a dead and a live layer before the last one; batch statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.cut, self.dead, self.live = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.drop, self.last = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)

    def forward(self, x):
        y = self.cut(x).detach()  # here: cut
        y = y + self.dead(x).round()  # here: dead
        return self.last(self.drop(self.norm(y + self.live(x))))


def train(*, armed=(), steps=4, scale=None, accumulate=1):
    """Train and return the model, and the readings of the armed steps."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    readings = []
    for step in range(steps):
        probes = ArmedProbes(model, list(model.named_parameters()), step)
        assert probes.start() is True if step in armed else True
        optimizer.zero_grad()
        for _ in range(accumulate):
            loss = model(torch.randn(8, 4)).square().mean() / accumulate
            scaler.scale(loss).backward()
        readings += probes.stop()
        scaler.step(optimizer)
        scaler.update()
    return model, readings


@pytest.mark.parametrize("options", [{}, {"scale": 1024.0}, {"accumulate": 3}])
def test_a_real_step_is_explained(options):
    """Both faults are named by parameter and line, once; nothing is said of live parameters."""
    _, readings = train(armed=(1,), **options)
    named = {(r.step, r.kind, r.parameter, r.op): found(r) for r in readings}
    assert len(readings) == len(named)
    assert named == {
        (1, "cut", "cut.weight", "detach"): marked("cut"),
        (1, "cut", "cut.bias", "detach"): marked("cut"),
        (1, "dead", "dead.weight", "round"): marked("dead"),
        (1, "dead", "dead.bias", "round"): marked("dead"),
    }


@pytest.mark.parametrize("options", [{}, {"scale": 1024.0}, {"accumulate": 3}])
def test_training_with_armed_steps_is_bit_identical(options):
    """Weights, statistics and the generator are those of a run that was never probed."""
    plain, _ = train(**options)
    state = torch.get_rng_state()
    probed, _ = train(armed=(0, 2, 3), **options)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(plain.state_dict().values(), probed.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_stack_and_the_graph_are_clean_afterwards():
    """No function mode and no node hook is left, even when the graph lives on."""
    model = Net()
    probes = ArmedProbes(model, list(model.named_parameters()), 0)
    assert probes.start()
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward(retain_graph=True)
    probes.stop()
    assert _len_torch_function_stack() == 0
    before = len(probes._backwards)
    loss.backward()
    assert (before, probes.stop()) == (0, ())


def test_nothing_of_the_step_is_kept_alive():
    """Batch, activations, graph and model die as they do without probes, armed or not."""
    model = Net()
    probes = ArmedProbes(model, list(model.named_parameters()), 0)
    probes.start()
    batch = torch.randn(8, 4)
    middle = model.live(batch).relu()
    loss = model.last(middle).sum()
    loss.backward()
    watched = [weakref.ref(one) for one in (batch, middle, loss)]
    del batch, middle, loss
    assert [one() for one in watched] == [None, None, None]
    probes.stop()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert probes.start() is False


def test_a_nonfinite_gradient_is_traced_to_its_birth():
    """The rule's fact says sqrt, its line and that it was the derivative."""
    model = nn.Linear(3, 3)
    probes = ArmedProbes(model, list(model.named_parameters()), 5)
    probes.start()
    squares = (model(torch.ones(2, 3)) * 0).square().sum(-1)
    loss = squares.sqrt().sum()  # here: birth
    loss.backward()
    (reading,) = probes.stop()
    assert (reading.kind, reading.op, reading.phase) == ("nonfinite", "sqrt", "backward")
    assert found(reading) == marked("birth")


def test_backward_by_the_function_is_heard_too():
    """``torch.autograd.backward`` is how trainers differentiate several losses at once."""
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("a", "b")})
    probes = ArmedProbes(model, list(model.named_parameters()), 0)
    probes.start()
    x = torch.ones(2, 3)
    torch.autograd.backward([model["a"](x).round().sum(), model["b"](x).sum()])  # here: both
    readings = probes.stop()
    assert {(r.kind, r.parameter) for r in readings} == {("dead", "a.weight"), ("dead", "a.bias")}
    assert {found(r) for r in readings} == {marked("both")}


class Foreign(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_it_does_not_start_beside_another_function_mode():
    """The user's own mode keeps its place."""
    model = nn.Linear(2, 2)
    probes = ArmedProbes(model, list(model.named_parameters()), 0)
    with Foreign():
        assert probes.start() is False
    assert probes.stop() == ()
    assert probes.start() is True
    assert probes.start() is False
    probes.stop()
    assert _len_torch_function_stack() == 0


def test_it_does_not_start_on_a_compiled_model():
    """Its parts would have to be compiled anew."""
    model = torch.compile(nn.Linear(2, 2), backend="eager")
    assert ArmedProbes(model, list(model.named_parameters()), 0).start() is False


def test_a_mode_entered_later_is_not_popped():
    """The probe falls silent at stop and leaves the stack once it is on top again."""
    model = nn.Linear(2, 2)
    probes = ArmedProbes(model, list(model.named_parameters()), 0)
    probes.start()
    with Foreign():
        model(torch.ones(1, 2)).sum().backward()
        assert probes.stop() == ()
        assert _len_torch_function_stack() == 2
    assert probes.stop() == ()
    assert _len_torch_function_stack() == 0


# torch's compiler asks every argument for its gradient and hides this warning itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_function_stays_whole():
    """A function compiled for the whole graph runs under armed probes without a break."""
    model = nn.Linear(2, 2)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(y):
        return (y * 2).relu()

    x = torch.ones(3, 2)
    expected = compiled(model(x))
    probes = ArmedProbes(model, list(model.named_parameters()), 0)
    probes.start()
    got = compiled(model(x))
    got.sum().backward()
    probes.stop()
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("owner", "method"),
    [(CutLedger, "before"), (CutLedger, "after"), (CutLedger, "cuts_of"), (FlagRoll, "take")],
)
def test_a_fault_of_the_probe_never_reaches_the_step(monkeypatch, owner, method):
    """The step's gradients are those of an unprobed one; the fault comes out of ``stop``."""
    model = nn.Linear(2, 2)
    x = torch.ones(3, 2)
    model(x).square().sum().backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    probes = ArmedProbes(model, list(model.named_parameters()), 0)
    probes.start()

    def broken(*_):
        raise LookupError("planted")

    monkeypatch.setattr(owner, method, broken)
    model(x).square().sum().backward()
    assert torch.equal(model.weight.grad, expected)
    with pytest.raises(LookupError, match="planted"):
        probes.stop()
    assert _len_torch_function_stack() == 0


def test_the_users_own_error_comes_through():
    """An exception of an operation is the user's, and the probe goes on."""
    model = nn.Linear(2, 2)
    probes = ArmedProbes(model, list(model.named_parameters()), 0)
    probes.start()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.ones(3, 5))
    model(torch.ones(3, 2)).sum().backward()
    assert probes.stop() == ()


def test_a_step_without_a_backward_says_nothing():
    """No gradient is no fault when nothing was differentiated."""
    model = nn.Linear(2, 2)
    probes = ArmedProbes(model, list(model.named_parameters()), 0)
    probes.start()
    model(torch.ones(3, 2))
    assert probes.stop() == ()


def test_a_graph_kept_from_an_earlier_step_does_not_borrow_lines():
    """Nodes made in one armed step and differentiated in the next have no line there, not a wrong one."""
    model = nn.Linear(2, 2)
    named = list(model.named_parameters())
    first = ArmedProbes(model, named, 0)
    first.start()
    kept = model(torch.ones(3, 2)).round()
    first.stop()
    second = ArmedProbes(model, named, 1)
    second.start()
    (torch.ones(3, 2) * 2 + torch.ones(2)).sum()
    torch.autograd.backward(kept.sum())
    readings = second.stop()
    assert {(r.op, r.line) for r in readings} == {("round", None)}

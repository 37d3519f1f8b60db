"""Code as people write it: odd ways to lose or keep a path, transforms, masks, whole architectures."""

from __future__ import annotations

import copy
import inspect
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch._C import _len_torch_function_stack
from torch.nn import functional as F

from gradguard.explain.armed import ArmedProbes
from gradguard.explain.explainers import explain_paths, locate_dead, locate_nonfinite


class Net(nn.Module):
    """Two layers; ``body`` says how they are put together, and ``a`` is the one that may be cut off."""

    def __init__(self, body):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.register_buffer("memory", torch.zeros(3, 4))
        self.body = body

    def forward(self, x):
        return self.body(self, x).float().square().mean()


def _copied_into_a_buffer(net, x):
    with torch.no_grad():
        net.memory.copy_(net.a(x))  # cut: no_grad
    return net.b(x) + net.memory


def _copied_past_the_graph(net, x):
    net.memory.data.copy_(net.a(x))  # cut: .data
    return net.b(x) + net.memory


def _assigned_to_data(net, x):
    other = torch.zeros(3, 4)
    other.data = net.a(x)  # cut: .data
    return net.b(x) + other


def _written_into_a_view(net, x):
    other = torch.zeros(3, 4)
    with torch.no_grad():
        other[0].copy_(net.a(x)[0])  # cut: no_grad
    return net.b(x) + other


def _written_with_out(net, x):
    other = torch.zeros(3, 4)
    with torch.no_grad():
        torch.add(net.a(x), 0, out=other)  # cut: no_grad
    return net.b(x) + other


def _averaged_in_place(net, x):
    net.memory.mul_(0.9).add_(net.a(x).detach(), alpha=0.1)  # cut: detach
    return net.b(x) + net.memory


def _wrapped_in_a_parameter(net, x):
    hidden = net.a(x)
    again = nn.Parameter(hidden)  # cut: re-wrapped tensor
    return net.b(x) + again * 2


def _read_one_by_one(net, x):
    numbers = torch.Tensor([v.item() for v in net.a(x)[0]])  # cut: item
    return net.b(x) + numbers


def _listed_by_rows(net, x):
    numbers = [row.sum().tolist() for row in net.a(x)]  # cut: tolist
    return net.b(x) * torch.tensor(numbers)[:, None]


def _through_numpy_and_back(net, x):
    hidden = net.a(x).detach().cpu().numpy()  # cut: numpy
    return net.b(x) + torch.from_numpy(hidden * 2)


def _stacked_data(net, x):
    return net.b(x) + torch.stack([row.data for row in net.a(x)])  # cut: .data


def _indices_beside_values(net, x):
    hidden = net.a(x)
    _, index = hidden.topk(2, dim=1)  # cut: integer result
    return net.b(x) + F.one_hot(index[:, 0], 4)


def _in_a_method_chain(net, x):
    hidden = (
        net.a(x)
        .relu()
        .detach()  # cut: detach
        .sigmoid()
    )
    return net.b(x) + hidden


def _a_mask_beside_the_cut(net, x):
    hidden = net.a(x)
    mask = (hidden > 0).float()
    frozen = hidden.detach()  # cut: detach
    return net.b(x) * mask + frozen


def _under_autocast(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net.b(x) + net.a(x).detach()  # cut: detach


def _after_vmap(net, x):
    hidden = torch.func.vmap(lambda row: net.a(row).sin())(x)
    return net.b(x) + hidden.detach()  # cut: detach


def _with_a_deep_copy(net, x):
    twin = copy.deepcopy(net.a)  # cut: *
    return net.b(x) + twin(x)


CUTS = (
    _copied_into_a_buffer,
    _copied_past_the_graph,
    _assigned_to_data,
    _written_into_a_view,
    _written_with_out,
    _averaged_in_place,
    _wrapped_in_a_parameter,
    _read_one_by_one,
    _listed_by_rows,
    _through_numpy_and_back,
    _stacked_data,
    _indices_beside_values,
    _in_a_method_chain,
    _a_mask_beside_the_cut,
    _under_autocast,
    _after_vmap,
    _with_a_deep_copy,
)


def expected(body):
    """Return line number and reason from the comment in a function's source."""
    lines, start = inspect.getsourcelines(body)
    ((number, reason),) = [
        (start + i, text.partition("# cut: ")[2].strip())
        for i, text in enumerate(lines)
        if "# cut: " in text
    ]
    return number, reason


def explained(net, x):
    """Return the cuts by an explanation on demand."""
    return [
        (one.parameter, str(one.reason), one.line) for one in explain_paths(lambda: net(x), net)
    ]


def overheard(net, x):
    """Return the cuts that probes armed for one real step report."""
    probes = ArmedProbes(net, list(net.named_parameters()), 0)
    assert probes.start()
    try:
        net(x).backward()
    finally:
        readings = probes.stop()
    return [(one.parameter, one.reason, one.line) for one in readings if one.kind == "cut"]


@pytest.mark.parametrize("look", [explained, overheard])
@pytest.mark.parametrize("body", CUTS, ids=lambda body: body.__name__.strip("_"))
def test_the_line_that_cuts_is_named(body, look):
    """Both parameters of the layer that is cut off are explained by that line, and no other parameter is."""
    net, x = Net(body), torch.randn(3, 4)
    number, reason = expected(body)
    found = look(net, x)
    assert {name for name, _, _ in found} == {"a.weight", "a.bias"}
    assert {line.rpartition(":")[2] for _, _, line in found} == {str(number)}
    assert {why for _, why, _ in found} == {reason} or reason == "*"


class Doubled(torch.autograd.Function):
    """A custom function with an honest derivative."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def _kept_by_writing_to_a_view(net, x):
    other = torch.zeros(3, 4)
    other[0].copy_(net.a(x)[0])
    return net.b(x) + other


def _kept_by_straight_through(net, x):
    hidden = net.a(x)
    return net.b(x) + hidden + (hidden.round() - hidden).detach()


def _kept_by_a_custom_function(net, x):
    return net.b(x) + Doubled.apply(net.a(x))


def _kept_by_a_transform(net, x):
    return net.b(x) + torch.func.vmap(lambda row: net.a(row).sin())(x)


def _kept_beside_metrics(net, x):
    hidden = net.a(x)
    with torch.no_grad():
        hidden.argmax(1).float().mean().item()
    return net.b(x) + hidden


KEPT = (
    _kept_by_writing_to_a_view,
    _kept_by_straight_through,
    _kept_by_a_custom_function,
    _kept_by_a_transform,
    _kept_beside_metrics,
)


@pytest.mark.parametrize("look", [explained, overheard])
@pytest.mark.parametrize("body", KEPT, ids=lambda body: body.__name__.strip("_"))
def test_a_path_that_is_kept_is_not_reported(body, look):
    """A parameter that gets a gradient after all is never called cut, however the code looks."""
    assert look(Net(body), torch.randn(3, 4)) == []


MASKS = {
    "some positions": (lambda h: h.masked_fill(torch.eye(4)[0].bool(), -torch.inf), None),
    "additive": (lambda h: h + torch.full((4, 4), -torch.inf).triu(1)[1], None),
    "all positions": (lambda h: h.masked_fill(torch.ones(4).bool(), -torch.inf), "softmax"),
    "all, additive": (lambda h: h + torch.full((4,), -torch.inf), "softmax"),
}


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_is_no_fault_until_it_covers_everything(case):
    """Inf written down on purpose is not reported; the softmax that makes NaN of it is."""
    mask, op = MASKS[case]
    net = nn.Linear(4, 4)
    origin = locate_nonfinite(lambda: mask(net(torch.ones(3, 4))).softmax(1).square().sum(), net)
    assert (None if origin is None else (origin.op, origin.value)) == (op and (op, "nan"))


def test_finite_transforms_are_looked_through_in_peace():
    """vmap and grad inside of the forward pass neither raise nor are blamed."""
    net = nn.Linear(4, 4)
    x = torch.randn(3, 4)

    def forward():
        inner = torch.func.grad(lambda row: net(row).sin().sum())(x[0])
        return (torch.func.vmap(lambda row: net(row).sin())(x) + inner).mean()

    assert locate_nonfinite(forward, net) is None
    assert locate_dead(forward, net) == ()


def test_a_custom_function_is_not_blamed_on_a_later_line():
    """A derivative that is not finite inside a custom Function does not get the line that merely uses it."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.inf

    net = nn.Linear(4, 4)

    def forward():
        hidden = Broken.apply(net(torch.ones(3, 4)))
        return hidden.mean()

    origin = locate_nonfinite(forward, net)
    assert origin is not None
    assert (origin.op, origin.phase) == ("Broken", "backward")
    assert "mean" not in (origin.source or "")


ARCHITECTURES = {
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout2d(0.5)
        ),
        lambda: torch.randn(4, 3, 8, 8),
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: torch.randn(4, 5, 8),
    ),
    "recurrent": (lambda: nn.LSTM(4, 4, 2, dropout=0.3), lambda: torch.randn(5, 3, 4)),
    "sparse": (lambda: nn.Embedding(10, 4, sparse=True), lambda: torch.randint(0, 10, (4, 3))),
}


def fingerprint(net):
    """Return all bits of the model, its gradients and the random state."""
    tensors = [*net.state_dict().values(), *(p.grad for p in net.parameters())]
    raw = [
        None if t is None else t.to_dense().contiguous().reshape(-1).view(torch.uint8).tolist()
        for t in (*tensors, torch.get_rng_state())
    ]
    return raw, [m.training for m in net.modules()], random.getstate(), str(np.random.get_state())


def loss_of(net, x):
    """Return a loss."""
    out = net(x)
    return (out[0] if isinstance(out, tuple) else out).square().mean()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_explanations_leave_no_trace(name):
    """Weights, buffers, gradients, modes and random state have the same bits after each explanation."""
    build, data = ARCHITECTURES[name]
    torch.manual_seed(0)
    net = build()
    x = data()
    loss_of(net, x).backward()
    old = fingerprint(net)
    for look in (explain_paths, locate_nonfinite, locate_dead):
        assert not look(lambda: loss_of(net, x), net)
        assert fingerprint(net) == old
    assert _len_torch_function_stack() == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_under_armed_probes_computes_the_same_bits(name):
    """Training with probes armed for two of four steps ends as training without."""
    build, data = ARCHITECTURES[name]
    ends = []
    for armed in ((), (0, 2)):
        torch.manual_seed(0)
        net = build()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(4):
            probes = ArmedProbes(net, list(net.named_parameters()), step)
            assert step not in armed or probes.start()
            optimizer.zero_grad()
            for _ in range(2):
                loss_of(net, data()).backward()
            assert probes.stop() == ()
            optimizer.step()
        ends.append(fingerprint(net))
    assert ends[0] == ends[1]
    assert _len_torch_function_stack() == 0

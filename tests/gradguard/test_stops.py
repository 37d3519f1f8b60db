import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradguard.trials.stops import stops_held


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.detach() * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class SquareApart(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def target(w):
    """Return a target that gets no gradient."""
    with torch.no_grad():
        return w.exp() * 3


# Each loss, and the derivative that its gradient stands for, at w.
STOPPED = {
    "detach": lambda w: (w.exp().detach() * w).sum(),
    "data": lambda w: (w.exp().data * w).sum(),
    "no_grad target": lambda w: (w - target(w)).square().sum(),
    "straight through": lambda w: (w + (w.round() - w).detach()).square().sum(),
}
WHOLE = {
    "plain": lambda w: w.exp().sum(),
    "function": lambda w: Square.apply(w).sum(),
    "function with setup_context": lambda w: SquareApart.apply(w).sum(),
    "reentrant checkpoint": lambda w: checkpoint(torch.exp, w, use_reentrant=True).sum(),
    "checkpoint": lambda w: checkpoint(torch.exp, w, use_reentrant=False).sum(),
}


def difference(loss_fn, w, *, step=1e-5):
    """Return the central difference along the vector of ones."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            w.add_(sign * step)
        values.append(float(loss_fn().detach()))
        with torch.no_grad():
            w.sub_(sign * step)
    return (values[0] - values[1]) / (2 * step)


def weights():
    """Return weights that stay on one side of every rounding step."""
    return nn.Parameter(torch.tensor([0.3, 0.8, 1.2], dtype=torch.float64))


@pytest.mark.parametrize("name", [*STOPPED, *WHOLE])
def test_the_difference_is_that_of_the_gradient(name):
    """With stopped values held, the finite difference is what autograd says."""
    w = weights()
    loss_fn = stops_held(lambda: (STOPPED | WHOLE)[name](w))
    loss_fn().backward()
    assert difference(loss_fn, w) == pytest.approx(float(w.grad.sum()), rel=1e-6)


@pytest.mark.parametrize("name", STOPPED)
def test_without_holding_it_is_another_one(name):
    """The losses of this test do stop something: bare, the difference is not the gradient."""
    w = weights()
    STOPPED[name](w).backward()
    bare = difference(lambda: STOPPED[name](w), w)
    assert abs(bare - float(w.grad.sum())) > 0.05 * abs(bare)


@pytest.mark.parametrize("name", [*STOPPED, *WHOLE])
def test_at_the_first_weights_nothing_changes(name):
    """Loss and gradient of the first call are those of the bare loss, and a second call repeats them."""
    w, bare = weights(), weights()
    loss_fn = stops_held(lambda: (STOPPED | WHOLE)[name](w))
    (STOPPED | WHOLE)[name](bare).backward()
    for _ in range(2):
        w.grad = None
        loss = loss_fn()
        loss.backward()
        assert torch.equal(loss, (STOPPED | WHOLE)[name](bare))
        assert torch.equal(w.grad, bare.grad)


def test_buffers_written_in_place_are_their_owners():
    """What is written in place under no_grad is not replaced: statistics move on as they do bare."""
    norm, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    loss_fn = stops_held(lambda: norm(x).sum())
    for _ in range(3):
        loss_fn()
    assert int(norm.num_batches_tracked) == 3

"""A block after which everything is as before, bit for bit."""

from __future__ import annotations

import pickle
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from gradguard.explain.undisturbed import undisturbed
from tests.gradguard.loops import OPTIMIZERS, make_optimizer


def make_net():
    """Return a net with buffers, dropout, tied weights, a frozen layer and a NaN among its values."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Linear(4, 2)
    )
    net[3].weight = net[0].weight
    net[3].bias.requires_grad_(False)
    net[1].register_buffer("later", None)
    with torch.no_grad():
        net[4].bias[0] = torch.nan
    return net


def bits(value):
    """Return a form of a value that is equal for equal bits only."""
    if isinstance(value, torch.Tensor):
        # the identity too: optimizers and tied modules must go on seeing the same tensor
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return id(value), value.data_ptr(), value.dtype, tuple(value.shape), raw
    if isinstance(value, dict):
        return {str(k) if isinstance(k, str) else id(k): bits(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(one) for one in value]
    return value


def everything(net, *optimizers):
    """Return all that the block promises to restore."""
    return {
        "tensors": {
            n: (bits(t), t.requires_grad, t.grad is None or bits(t.grad))
            for n, t in (*net.named_parameters(), *net.named_buffers())
        },
        "held": [
            {k: bits(v) for k, v in (*m._parameters.items(), *m._buffers.items())}
            for m in net.modules()
        ],
        "modules": [(id(m), m.training) for m in net.modules()],
        "optimizers": [
            (bits(one.state), bits(one.param_groups), sorted(vars(one))) for one in optimizers
        ],
        "random": (
            bits(torch.get_rng_state().clone())[4],
            random.getstate(),
            pickle.dumps(np.random.get_state()),
        ),
        "grad mode": torch.is_grad_enabled(),
    }


def train(net, optimizer, steps):
    """Take steps."""
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 4)).nan_to_num().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("before", [0, 2], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_inside_leaves_no_trace(name, before):
    """After steps inside the block, weights, buffers, state, gradients and random state have their old bits."""
    net = make_net()
    optimizer = make_optimizer(name, (p for p in net.parameters() if p.requires_grad))
    train(net, optimizer, before)
    old = everything(net, optimizer)
    with undisturbed(net, [optimizer]):
        train(net, optimizer, 3)
        net.eval()
        assert everything(net, optimizer) != old
    assert everything(net, optimizer) == old


def test_a_restored_run_goes_on_as_if_nothing_had_been():
    """Training with a block in the middle ends with the bits of training without."""
    ends = []
    for with_block in (False, True):
        net = make_net()
        optimizer = make_optimizer("adamw-default", net.parameters())
        train(net, optimizer, 2)
        if with_block:
            with undisturbed(net, [optimizer]):
                train(net, optimizer, 2)
        train(net, optimizer, 2)
        ends.append([bits(p)[2:] for p in net.state_dict().values()])
    assert ends[0] == ends[1]


def surgery(net, optimizer):
    """Do what users do to a model beside training it."""
    net[0].weight.requires_grad_(False)
    net[3].bias.requires_grad_(True)
    net[3].weight = nn.Parameter(torch.zeros(4, 4))
    net[1].running_mean = torch.ones(4)
    net[1].later = torch.ones(4)
    net[1].register_buffer("extra", torch.ones(1))
    net.add_module("new", nn.Linear(2, 2))
    net[4].weight.grad = torch.ones(2, 4)
    net[4].weight.data = torch.zeros(2, 4)
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.param_groups[0]["new"] = 1
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer.state.clear()
    random.random()
    np.random.rand()
    torch.rand(1)
    torch.set_grad_enabled(False)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_surgery_inside_is_undone_however_the_block_ends(error):
    """Tensors, modules, groups and modes that were swapped, added or cleared are the old ones again."""
    net = make_net()
    optimizer = make_optimizer("momentum-default", net.parameters())
    train(net, optimizer, 1)
    old = everything(net, optimizer)
    ending = nullcontext() if error is None else pytest.raises(error)
    with ending, undisturbed(net, [optimizer]):
        surgery(net, optimizer)
        if error is not None:
            raise error
    assert everything(net, optimizer) == old


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.half, nn.Module.bfloat16])
def test_a_changed_dtype_is_undone(change):
    """Parameters get their old memory back after the model was converted."""
    net = make_net()
    net(torch.randn(8, 4)).nan_to_num().sum().backward()
    old = everything(net)
    with undisturbed(net):
        change(net)
    assert everything(net) == old


def test_a_graph_from_before_is_still_good():
    """Writing the values back does not make autograd refuse a graph that was built before the block."""
    net = nn.Linear(3, 1)
    loss = (net(torch.ones(2, 3)) * net.weight.sum()).square().sum()
    with undisturbed(net):
        net.weight.data.add_(1)
    loss.backward()
    assert net.weight.grad is not None


def test_gradients_that_were_none_are_none_again():
    """A backward inside leaves no gradient, and a gradient from before keeps its tensor and content."""
    net = nn.Linear(3, 1)
    net.weight.grad = kept = torch.full((1, 3), 5.0)
    with undisturbed(net):
        net(torch.ones(2, 3)).sum().backward()
        net.weight.grad = None
        kept.zero_()
    assert net.weight.grad is kept
    assert net.weight.grad.tolist() == [[5.0, 5.0, 5.0]]
    assert net.bias.grad is None


def test_sparse_gradients_and_expanded_buffers_are_kept():
    """A sparse gradient comes back with its content, and a buffer that torch cannot write to does no harm."""
    net = nn.Embedding(5, 2, sparse=True)
    net.register_buffer("positions", torch.zeros(1).expand(4))
    net(torch.tensor([1, 3])).sum().backward()
    old, content = net.weight.grad, net.weight.grad.to_dense()
    with undisturbed(net):
        net(torch.tensor([1, 1])).sum().backward()
    assert net.weight.grad is old
    assert torch.equal(net.weight.grad.to_dense(), content)


def test_a_scheduler_still_knows_whether_the_optimizer_has_stepped():
    """A step inside does not hide from a scheduler that no step has been taken yet."""
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with undisturbed(net, [optimizer]):
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_lbfgs_lists_come_back():
    """State that is kept in nested lists is restored as deep as it goes."""
    net = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)
    data = torch.randn(6, 3)

    def closure():
        optimizer.zero_grad()
        loss = (net(data) - 1).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    old = everything(net, optimizer)
    with undisturbed(net, [optimizer]):
        optimizer.step(closure)
        assert everything(net, optimizer) != old
    assert everything(net, optimizer) == old


def test_lazy_parameters_are_refused_with_advice():
    """A lazy model cannot be copied, and the message says what to do."""
    with (
        pytest.raises(ValueError, match="run one forward pass first"),
        undisturbed(nn.LazyLinear(2)),
    ):
        pass

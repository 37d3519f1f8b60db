"""After an explanation everything is as it was, also when the forward pass fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._C import _len_torch_function_stack

from gradguard.explain import explain_paths, locate_dead, locate_nonfinite


def make():
    """Return a model with every kind of state a forward pass changes, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2)
    )
    model[4].bias.requires_grad_(False)
    model(torch.randn(5, 4)).square().sum().backward()
    return model, torch.randn(6, 4)


def state(model):
    """Return bytes of all that must stay: values, gradients, modes, generator, graphs and hooks."""
    tensors = [*model.parameters(), *model.buffers()]
    return (
        [t.detach().numpy().tobytes() for t in tensors],
        [(id(t.grad), None if t.grad is None else t.grad.numpy().tobytes()) for t in tensors],
        [t._version for t in tensors],
        [t.requires_grad for t in tensors],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state().numpy().tobytes(),
        torch.is_grad_enabled(),
        _len_torch_function_stack(),
    )


EXPLAINERS = [explain_paths, locate_nonfinite, locate_dead]


@pytest.mark.parametrize("explain", EXPLAINERS)
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_left_behind(explain, grad):
    """Every bit of the model, its gradients and the generator is as before; versions count no step."""
    model, x = make()
    with torch.set_grad_enabled(grad):
        before = state(model)
        explain(lambda: model(x).square().sum(), model)
        after = state(model)
    # BatchNorm counts in place; its values are put back without a further count.
    assert [*before[:2], *before[3:]] == [*after[:2], *after[3:]]


@pytest.mark.parametrize("explain", EXPLAINERS)
def test_a_failing_forward_leaves_nothing_behind(explain):
    """The user's exception comes through as it is."""
    model, x = make()

    def forward():
        model.eval()
        model(x)
        torch.rand(3)
        raise KeyError("batch")

    before = state(model)
    with pytest.raises(KeyError, match="batch"):
        explain(forward, model)
    assert state(model)[:2] + state(model)[4:] == before[:2] + before[4:]


@pytest.mark.parametrize("explain", EXPLAINERS)
def test_a_graph_recorded_before_can_still_be_differentiated(explain):
    """An explanation in the middle of a step does not disturb its backward pass."""
    model, x = make()
    model.zero_grad()
    torch.manual_seed(1)
    model(x).square().sum().backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model, x = make()
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(x).square().sum()
    explain(lambda: model(x).square().sum(), model)
    loss.backward()
    for one, p in zip(expected, model.parameters(), strict=True):
        assert one is p.grad is None or torch.equal(one, p.grad)


# torch.jit is deprecated in newer releases, and still met in checkpoints.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_model_is_looked_at_and_put_back():
    """Its registries are of another kind; its operations are one place."""
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(3, 4)
    assert explain_paths(lambda: model(x).square().mean(), model) == ()
    assert locate_nonfinite(lambda: model(x).square().mean(), model) is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])

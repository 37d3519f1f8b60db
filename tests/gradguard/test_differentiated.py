import pytest
import torch
from torch import nn
from torch.nn import functional

from gradguard.explain.explainers import explain_paths
from gradguard.trials.differentiated import NothingDifferentiatedError, differentiated
from tests.gradguard.loops import any_changed, batches, make_optimizer, small_net, weights_of

BATCHES = batches(4)


def make_step(model, optimizer, *, clip=None):
    """Return a complete step with accumulation over all batches that returns a printed loss."""

    def step():
        optimizer.zero_grad()
        for batch in BATCHES:
            loss = functional.mse_loss(model(batch.x), batch.y) / len(BATCHES)
            loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return float(loss.detach())

    return step


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_its_gradient_is_that_of_the_step(clip):
    """The gradient of the function is what all backward passes add up to, before clipping."""
    model = small_net()
    step = make_step(model, torch.optim.SGD(model.parameters(), lr=0.0), clip=clip)
    differentiated(step)().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    make_step(model, torch.optim.SGD(model.parameters(), lr=0.0))()
    for mine, real in zip(got, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(mine, real)


@pytest.mark.parametrize(
    "name", ["sgd-default", "momentum-foreach", "adamw-default", "adamw-fused"]
)
def test_the_optimizer_moves_nothing(name):
    """Held back from its gradients, the step leaves weights and optimizer state as they were."""
    model = small_net()
    optimizer = make_optimizer(name, model.parameters())
    before = weights_of(model.parameters())
    differentiated(make_step(model, optimizer))()
    assert not any_changed(before, model.parameters())
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())


def test_a_closure_is_evaluated_once():
    """LBFGS stops after one evaluation, so that the loss is counted once."""
    model, batch = small_net(), BATCHES[0]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=8)

    def closure():
        optimizer.zero_grad()
        loss = functional.mse_loss(model(batch.x), batch.y)
        loss.backward()
        return loss

    loss = differentiated(lambda: optimizer.step(closure))()
    torch.testing.assert_close(loss, functional.mse_loss(model(batch.x), batch.y))


def test_the_line_of_a_cut_is_found_in_a_complete_step():
    """With it, explain_paths names the user's line although the step runs to its end."""

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            hidden = self.first(x).detach()
            return self.last(hidden)

    model = Cut()
    step = make_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    cuts = explain_paths(differentiated(step), model)
    assert {cut.parameter for cut in cuts} == {"first.weight", "first.bias"}
    assert all("self.first(x).detach()" in (cut.source or "") for cut in cuts)


def test_an_error_before_any_loss_passes_and_backward_works_again():
    """The step's own error is not swallowed, and the hold on backward ends with the call."""
    model = small_net()

    def step():
        raise ValueError("the step's own")

    with pytest.raises(ValueError, match="the step's own"):
        differentiated(step)()
    model(BATCHES[0].x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("late", ["scaler", "log"])
def test_what_fails_for_want_of_gradients_ends_the_step(late):
    """A scaler that finds no gradient, or a log of their norms, does not spoil the loss."""
    model, batch = small_net(), BATCHES[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=late == "scaler")

    def step():
        optimizer.zero_grad()
        scaler.scale(functional.mse_loss(model(batch.x), batch.y)).backward()
        if late == "log":
            model[0].weight.grad.norm()
        scaler.step(optimizer)

    scale = 8.0 if late == "scaler" else 1.0
    torch.testing.assert_close(
        differentiated(step)(), scale * functional.mse_loss(model(batch.x), batch.y)
    )


@pytest.mark.parametrize(
    "differentiate",
    [
        pytest.param(lambda loss: None, id="not at all"),
        pytest.param(lambda loss: loss.backward(torch.ones_like(loss)), id="own gradient"),
        pytest.param(lambda loss: torch.autograd.backward(loss.sum()), id="autograd.backward"),
    ],
)
def test_what_it_cannot_hold_back_is_refused(differentiate):
    """A step that differentiates otherwise is refused with a sentence, never answered wrongly."""
    model = small_net()
    with pytest.raises(NothingDifferentiatedError, match="the step"):
        differentiated(lambda: differentiate(model(BATCHES[0].x)))()

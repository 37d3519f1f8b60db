"""Healthy runs that tempt a rule about modes, outputs, losses and targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import healthy, network, regression
from tests.faults.mode_and_loss import fitted, flat, labelled, noisy, scored

STEPS = 24


@healthy
def frozen_normalisation() -> RunLog:
    """The normalisation of a backbone stays in eval mode while the model trains."""
    model = noisy()
    with torch.no_grad():
        for x, _ in regression(60):
            model(x)
    model[1].eval().requires_grad_(False)
    return fitted(model, regression(STEPS), functional.mse_loss)


@healthy
def no_layer_that_minds_the_mode() -> RunLog:
    """A plain perceptron is trained in eval mode, to which it is blind."""
    return fitted(network().eval(), regression(STEPS), functional.mse_loss)


@healthy
def attacks_in_eval_mode() -> RunLog:
    """Inputs are attacked in eval mode before every step in train mode."""
    model = noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(STEPS):
            model.eval()
            x.requires_grad_()
            (slope,) = torch.autograd.grad(functional.mse_loss(model(x), y), x)
            model.train()
            loss = functional.mse_loss(model((x + 0.1 * slope.sign()).detach()), y)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@healthy
def guesses_in_train_mode() -> RunLog:
    """Unlabelled rows get the model's own guess, made in train mode under no_grad at every step."""
    model = noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(STEPS):
            other = torch.randn(32, 8)
            with torch.no_grad():
                guess = model(other)
            loss = functional.mse_loss(model(x), y) + 0.1 * functional.mse_loss(model(other), guess)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@healthy
def guesses_from_the_middle() -> RunLog:
    """The model's own guesses join in when it has learned something, at every step from there on."""
    model = noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(STEPS)):
            loss = functional.mse_loss(model(x), y)
            if index >= STEPS * 3 // 4:
                other = torch.randn(32, 8)
                with torch.no_grad():
                    guess = model(other)
                loss = loss + 0.1 * functional.mse_loss(model(other), guess)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@healthy
def statistics_refreshed_before_validation() -> RunLog:
    """Running statistics are refreshed in train mode, and the validation runs in eval mode."""
    model = noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(STEPS)):
            if index and index % 8 == 0:
                with torch.no_grad():
                    for again, _ in regression(4):
                        model(again)
                    model.eval()
                    model(torch.randn(32, 8))
                model.train()
            loss = functional.mse_loss(model(x), y)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@healthy
def averaged_model_refreshed() -> RunLog:
    """A stochastic average of the weights with its own running statistics, refreshed at the end."""
    model = noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model)
    batches = list(regression(STEPS))
    with gg.watch(model, optimizer, averaged=average) as guard:
        for x, y in batches:
            loss = functional.mse_loss(model(x), y)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        torch.optim.swa_utils.update_bn([x for x, _ in batches], average)
    return guard.log


@healthy
def sampled_dropout_at_the_end() -> RunLog:
    """Dropout alone is switched on in evaluations, to sample predictions."""
    model = noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(STEPS)):
            if index and index % 6 == 0:
                model.eval()
                model[3].train()
                with torch.no_grad():
                    for _ in range(5):
                        model(torch.randn(32, 8))
                model.train()
            loss = functional.mse_loss(model(x), y)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


# --- losses that look wrong ---------------------------------------------------------------------


@healthy
def logarithm_of_a_softmax() -> RunLog:
    """The model ends in a softmax, and the loss takes its logarithm."""
    model = nn.Sequential(network(outputs=3), nn.Softmax(1))
    return fitted(
        model, labelled(STEPS), lambda p, y: functional.nll_loss(p.clamp_min(1e-8).log(), y)
    )


@healthy
def logarithms_into_cross_entropy() -> RunLog:
    """The logarithm of a softmax is left as it is by the log-softmax of cross_entropy."""
    model = nn.Sequential(network(outputs=3), nn.LogSoftmax(1))
    return fitted(model, labelled(STEPS), functional.cross_entropy)


@healthy
def bounded_scores_with_a_temperature() -> RunLog:
    """Cosine similarities over a temperature go into cross_entropy."""

    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classes = network(outputs=8), nn.Parameter(torch.randn(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            found = functional.normalize(self.body(x), dim=1)
            return found @ functional.normalize(self.classes, dim=1).T / 0.1

    return fitted(Cosine(), labelled(STEPS), functional.cross_entropy)


@healthy
def similarities_both_ways() -> RunLog:
    """A batch is matched with itself, by rows and by columns."""

    def loss_of(output: Tensor, y: Tensor) -> Tensor:
        left, right = functional.normalize(output, dim=1), functional.normalize(y, dim=1)
        scores, own = left @ right.T / 0.2, torch.arange(len(y))
        columns = functional.log_softmax(scores, 0).diagonal().mean()
        return functional.cross_entropy(scores, own) - columns

    batches = [(x, x[:, :4] + 0.1 * torch.randn(32, 4)) for x, _ in regression(STEPS)]
    return fitted(network(outputs=4), batches, loss_of)


@healthy
def pairs_are_ranked() -> RunLog:
    """Every prediction is compared with every other one, on purpose."""

    def loss_of(output: Tensor, y: Tensor) -> Tensor:
        ours, theirs = output - output.T, y.unsqueeze(1) - y.unsqueeze(0)
        return functional.softplus(-ours * theirs.sign()).mean()

    return fitted(network(), flat()[:10] + flat()[:10], loss_of)


@healthy
def quantiles_of_one_target() -> RunLog:
    """Three quantiles are compared with one target each: the target broadcasts, the output does not."""
    levels = torch.tensor([0.1, 0.5, 0.9])

    def loss_of(output: Tensor, y: Tensor) -> Tensor:
        off = y - output
        return torch.maximum(levels * off, (levels - 1) * off).mean()

    return fitted(network(outputs=3), regression(STEPS), loss_of)


@healthy
def two_views_agree() -> RunLog:
    """Two passes with different dropout are pulled together by their divergence, each towards the other."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
        fixed = functional.log_softmax(theirs, 1).detach()
        return functional.kl_div(fixed, functional.softmax(ours, 1), reduction="batchmean")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for x, y in guard.batches(labelled(STEPS)):
            left, right = model(x), model(x)
            loss = functional.cross_entropy(left, y) + functional.cross_entropy(right, y)
            loss = loss + 0.5 * (divergence(left, right) + divergence(right, left))
            guard.observe(loss=loss, targets=y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@healthy
def which_moment() -> RunLog:
    """Sequences come with time first, and the model says which moment is the one."""

    class Pointer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(inputs=4)

        def forward(self, x: Tensor) -> Tensor:
            return functional.log_softmax(self.body(x).squeeze(2), 0)

    batches = []
    for _ in range(STEPS):
        x = torch.randn(12, 16, 4)
        batches.append((x, x[:, :, 0].argmax(0)))
    return fitted(Pointer(), batches, lambda output, y: functional.nll_loss(output.T, y))


@healthy
def sum_with_a_rate_for_it() -> RunLog:
    """A sum over the batch with a learning rate that suits it."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-4)
    return fitted(
        model,
        regression(STEPS),
        lambda output, y: functional.mse_loss(output, y, reduction="sum"),
        optimizer=optimizer,
    )


@healthy
def counts_below_a_softplus() -> RunLog:
    """Positive targets with a little noise below zero, under a softplus."""
    model = nn.Sequential(network(), nn.Softplus())
    return fitted(model, scored(lambda y: y + 1.0, STEPS), functional.mse_loss)


@healthy
def reconstruction() -> RunLog:
    """An autoencoder has its inputs as targets, through a bottleneck without activation."""
    model = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
    batches = [(x, x) for x, _ in regression(STEPS)]
    return fitted(model, batches, functional.mse_loss)


# --- targets and outputs that look wrong --------------------------------------------------------


@healthy
def masked_language_model() -> RunLog:
    """15 % of the tokens are replaced and have to be guessed; the rest is ignored."""
    batches = []
    for _ in range(STEPS):
        text = torch.randint(2, 50, (8, 16))
        hidden = torch.rand(8, 16) < 0.15
        hidden[:, 0] = True
        batches.append((text.masked_fill(hidden, 1), text.masked_fill(~hidden, -100)))
    model = nn.Sequential(nn.Embedding(50, 16), nn.GRU(16, 16, batch_first=True), _First())
    return fitted(
        nn.Sequential(model, nn.Linear(16, 50)),
        batches,
        lambda output, y: functional.cross_entropy(output.flatten(0, 1), y.flatten()),
    )


class _First(nn.Module):
    """Takes the first of several outputs."""

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        return given[0]


@healthy
def one_answer_per_text() -> RunLog:
    """Only the last token of a long text is learned: the rest is the question."""
    batches = []
    for _ in range(STEPS):
        text = torch.randint(50, (8, 200))
        goal = torch.full_like(text, -100)
        goal[:, -1] = text[:, 0]
        batches.append((text, goal))
    return fitted(
        nn.Sequential(
            nn.Embedding(50, 16), nn.GRU(16, 16, batch_first=True), _First(), nn.Linear(16, 50)
        ),
        batches,
        lambda output, y: functional.cross_entropy(output.flatten(0, 1), y.flatten()),
    )


@healthy
def nothing_to_learn() -> RunLog:
    """Targets are noise around a constant: the best output is that constant."""
    batches = [(x, 5 + torch.randn(32, 1)) for x, _ in regression(60)]
    return fitted(network(), batches, functional.mse_loss, detail_every=10)


@healthy
def loss_shifts_the_targets() -> RunLog:
    """The loader gives the tokens twice, and the loss compares each with the next one."""
    batches = [(text, text) for text in torch.randint(50, (STEPS, 8, 16))]
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))
    return fitted(
        model,
        batches,
        lambda output, y: functional.cross_entropy(
            output[:, :-1].flatten(0, 1), y[:, 1:].flatten()
        ),
        hold=False,
    )


@healthy
def windows_of_a_slow_series() -> RunLog:
    """The last value of a window nearly is the next one."""
    batches = []
    for _ in range(STEPS):
        walk = 5 * torch.randn(32, 1) + 0.01 * torch.randn(32, 9).cumsum(1)
        batches.append((walk[:, :8], walk[:, 8:]))
    return fitted(network(), batches, functional.mse_loss)


@healthy
def head_from_zero() -> RunLog:
    """The last layer begins at zero: the first outputs are the same for all rows."""
    head = nn.Linear(8, 1)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 3.0)
    model = nn.Sequential(network(outputs=8), nn.ReLU(), head)
    return fitted(model, scored(lambda y: y + 3, STEPS), functional.mse_loss, detail_every=4)


@healthy
def large_mean() -> RunLog:
    """Targets of a thousand, give or take one: outputs are alike beside their size."""
    head = nn.Linear(8, 1)
    nn.init.constant_(head.bias, 1000.0)
    model = nn.Sequential(network(outputs=8), nn.ReLU(), head)
    return fitted(model, scored(lambda y: y + 1000, STEPS), functional.mse_loss, detail_every=4)


@healthy
def linear_head_on_a_projection() -> RunLog:
    """Two linear layers in a row, the first of which makes the features that others use."""
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    return fitted(model, labelled(STEPS), functional.cross_entropy)


@healthy
def products_of_embeddings() -> RunLog:
    """A factorisation of a matrix: two tables and a product."""

    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.columns = nn.Embedding(20, 4), nn.Embedding(30, 4)

        def forward(self, pair: Tensor) -> Tensor:
            found: Tensor = self.rows(pair[:, 0]) * self.columns(pair[:, 1])
            return found.sum(1)

    truth = torch.randn(20, 2) @ torch.randn(2, 30)
    batches = []
    for _ in range(STEPS):
        pair = torch.stack([torch.randint(20, (32,)), torch.randint(30, (32,))], 1)
        batches.append((pair, truth[pair[:, 0], pair[:, 1]]))
    return fitted(Factors(), batches, functional.mse_loss)

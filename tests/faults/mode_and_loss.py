"""Faults of train and eval mode, and of the objective itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import fault, network, regression

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Goal = Callable[[Tensor], Tensor]

STEPS = 10


def labelled(
    steps: int = STEPS, *, classes: int = 3, rows: int = 32
) -> list[tuple[Tensor, Tensor]]:
    """Return batches of a classification: the largest of a few projections of the inputs."""
    directions = torch.randn(8, classes)
    inputs = [torch.randn(rows, 8) for _ in range(steps)]
    return [(x, (x @ directions + 0.3 * torch.randn(rows, classes)).argmax(1)) for x in inputs]


def scored(goal: Goal, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Return batches of a regression of shape (32, 1): a smooth function of the inputs, changed by ``goal``."""
    return [(x, goal(y)) for x, y in regression(steps)]


def flat(goal: Goal = lambda y: y) -> list[tuple[Tensor, Tensor]]:
    """Return the same with targets of shape (32,)."""
    return [(x, y.squeeze(1)) for x, y in scored(goal)]


def fitted(
    model: nn.Module,
    batches: Batches,
    loss_of: Loss,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    hold: bool = True,
    detail_every: int = 50,
) -> RunLog:
    """Train with everything shown to the guard; ``hold`` keeps the output alive beside the loss."""
    chosen = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, chosen, detail_every=detail_every) as guard:
        for x, y in guard.batches(batches):
            if hold:
                output = model(x)
                loss = loss_of(output, y)
            else:
                loss = loss_of(model(x), y)
            guard.observe(loss=loss, targets=y)
            loss.backward()
            chosen.step()
            chosen.zero_grad()
    return guard.log


def noisy(p: float = 0.2, momentum: float = 0.1) -> nn.Sequential:
    """Return a perceptron with normalisation and dropout."""
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.BatchNorm1d(16, momentum=momentum),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Linear(16, 1),
    )


# --- mode --------------------------------------------------------------------------------------


@fault("mode", "GG801")
def never_in_train_mode(broken: bool) -> RunLog:
    """A model that came in eval mode is trained as it came."""
    model = noisy().train(not broken)
    return fitted(model, regression(STEPS), functional.mse_loss)


@fault("mode", "GG801", since=4)
def validation_leaves_eval_mode(broken: bool) -> RunLog:
    """The validation after four steps calls model.eval() and nobody calls model.train()."""
    model = noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(12)):
            if index == 4:
                model.eval()
                with torch.no_grad():
                    model(torch.randn(32, 8))
                model.train(not broken)
            loss = functional.mse_loss(model(x), y)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@fault("mode", "GG802", since=4)
def validation_in_train_mode(broken: bool) -> RunLog:
    """Validation runs under no_grad, but with dropout, and changes the running statistics."""
    model = noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(16)):
            if index and index % 4 == 0:
                model.train(broken)
                with torch.no_grad():
                    for other, _ in guard.batches(regression(3), split="validation"):
                        model(other)
                model.train()
            loss = functional.mse_loss(model(x), y)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@fault("mode", "GG803", place="3")
def probability_to_keep(broken: bool) -> RunLog:
    """Dropout is given the probability to keep a value."""
    return fitted(noisy(0.95 if broken else 0.05), regression(STEPS), functional.mse_loss)


@fault("mode", "GG803")
def predictions_are_dropped(broken: bool) -> RunLog:
    """The last layer is dropout: predictions are zeroed before they are compared."""
    model = nn.Sequential(network(), nn.Dropout(0.3 if broken else 0.0))
    return fitted(model, regression(STEPS), functional.mse_loss)


@fault("mode", "GG804", place="1")
def momentum_counted_the_other_way(broken: bool) -> RunLog:
    """A momentum of 0.99 was copied from a library that counts the other way round."""
    model = noisy(momentum=0.99 if broken else 0.01)
    return fitted(model, regression(STEPS), functional.mse_loss)


class _Lifted(nn.Module):
    """Takes features that are far from zero mean."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 6


@fault("mode", "GG804", place="1")
def statistics_never_updated(broken: bool) -> RunLog:
    """A momentum of 0 leaves the running statistics at 0 and 1."""
    model = nn.Sequential(_Lifted(), noisy(momentum=0.0 if broken else 0.1))
    return fitted(model, regression(STEPS), functional.mse_loss)


# --- what the loss is given ---------------------------------------------------------------------


@fault("loss", "GG901")
def softmax_before_cross_entropy(broken: bool) -> RunLog:
    """The model ends in a softmax, and cross_entropy adds its own."""
    last = nn.Softmax(1) if broken else nn.Identity()
    return fitted(nn.Sequential(network(outputs=3), last), labelled(), functional.cross_entropy)


@fault("loss", "GG901")
def softmax_nobody_keeps(broken: bool) -> RunLog:
    """The same, where the output is not kept in a variable."""
    last = nn.Softmax(1) if broken else nn.Identity()
    model = nn.Sequential(network(outputs=3), last)
    return fitted(model, labelled(), functional.cross_entropy, hold=False)


@fault("loss", "GG901")
def sigmoid_before_loss_with_logits(broken: bool) -> RunLog:
    """The model ends in a sigmoid, and the loss applies another one."""
    last = nn.Sigmoid() if broken else nn.Identity()
    batches = scored(lambda y: (y > 0).float())
    model = nn.Sequential(network(), last)
    return fitted(model, batches, functional.binary_cross_entropy_with_logits)


@fault("loss", "GG901")
def likelihood_of_raw_scores(broken: bool) -> RunLog:
    """nll_loss is given logits instead of log-probabilities."""
    last = nn.Identity() if broken else nn.LogSoftmax(1)
    return fitted(nn.Sequential(network(outputs=3), last), labelled(), functional.nll_loss)


@fault("loss", "GG902")
def column_against_row(broken: bool) -> RunLog:
    """An output of (32, 1) and targets of (32,) give 32 x 32 differences."""
    return fitted(network(), flat() if broken else scored(lambda y: y), functional.mse_loss)


@fault("loss", "GG902")
def column_against_row_by_hand(broken: bool) -> RunLog:
    """The same with a difference of one's own."""
    batches = flat() if broken else scored(lambda y: y)
    return fitted(network(), batches, lambda output, y: (output - y).abs().mean())


@fault("loss", "GG902")
def column_against_row_nobody_keeps(broken: bool) -> RunLog:
    """The same, where the output is not kept in a variable."""
    batches = flat() if broken else scored(lambda y: y)
    return fitted(network(), batches, lambda output, y: (output - y).square().mean(), hold=False)


@fault("loss", "GG903")
def softmax_over_the_batch(broken: bool) -> RunLog:
    """log_softmax runs over the rows."""

    def loss_of(output: Tensor, y: Tensor) -> Tensor:
        return functional.nll_loss(functional.log_softmax(output, 0 if broken else 1), y)

    return fitted(network(outputs=3), labelled(), loss_of)


@fault("loss", "GG903")
def softmax_over_the_batch_nobody_keeps(broken: bool) -> RunLog:
    """The same, where the output is not kept in a variable."""

    def loss_of(output: Tensor, y: Tensor) -> Tensor:
        return functional.nll_loss(functional.log_softmax(output, 0 if broken else 1), y)

    return fitted(network(outputs=3), labelled(), loss_of, hold=False)


@fault("loss", "GG903")
def model_ends_in_softmax_over_the_batch(broken: bool) -> RunLog:
    """The softmax at the end of the model runs over the rows."""
    model = nn.Sequential(network(outputs=3), nn.LogSoftmax(0 if broken else 1))
    return fitted(model, labelled(), functional.nll_loss, hold=False)


@fault("loss", "GG904")
def sum_with_the_rate_of_a_mean(broken: bool) -> RunLog:
    """reduction="sum" under a learning rate made for the mean."""

    def loss_of(output: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(output, y, reduction="sum" if broken else "mean")

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fitted(model, scored(lambda y: 3 * y), loss_of, optimizer=optimizer)


@fault("loss", "GG905")
def sigmoid_cannot_reach(broken: bool) -> RunLog:
    """Targets of both signs below a sigmoid."""
    last = nn.Sigmoid() if broken else nn.Identity()
    return fitted(nn.Sequential(network(), last), scored(lambda y: 2 * y), functional.mse_loss)


@fault("loss", "GG905")
def relu_at_the_end(broken: bool) -> RunLog:
    """The last layer is a ReLU, and half of the targets are negative."""
    last = nn.ReLU() if broken else nn.Identity()
    model = nn.Sequential(network(), last)
    return fitted(model, scored(lambda y: y), functional.l1_loss, hold=False)


# --- targets ------------------------------------------------------------------------------------


def _words(shift: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of token sequences, and the tokens ``shift`` places later."""
    texts = [torch.randint(50, (8, 18)) for _ in range(STEPS)]
    return [(text[:, :14], text[:, shift : shift + 14]) for text in texts]


def _token_loss(output: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), y.flatten())


def _reader() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 50))


@fault("loss", "GG907")
def targets_not_shifted(broken: bool) -> RunLog:
    """The targets of a language model are its inputs."""
    return fitted(_reader(), _words(0 if broken else 1), _token_loss)


@fault("loss", "GG907")
def targets_shifted_twice(broken: bool) -> RunLog:
    """The data set shifts the targets, and the collate function shifts them again."""
    return fitted(_reader(), _words(2 if broken else 1), _token_loss, hold=False)


@fault("loss", "GG908")
def target_among_the_features(broken: bool) -> RunLog:
    """The column to predict was left in the table."""
    batches = scored(lambda y: y)
    leaked = [(torch.cat([x[:, :7], y], 1), y) for x, y in batches]
    return fitted(network(), leaked if broken else batches, functional.mse_loss)


@fault("loss", "GG908")
def label_among_the_features(broken: bool) -> RunLog:
    """The label was left in the table."""
    batches = labelled()
    leaked = [(torch.cat([x[:, :7], y.unsqueeze(1).float()], 1), y) for x, y in batches]
    return fitted(network(outputs=3), leaked if broken else batches, functional.cross_entropy)


@fault("loss", "GG909")
def every_label_ignored(broken: bool) -> RunLog:
    """A mask replaces every label by -100."""
    batches = [(x, torch.full_like(y, -100) if broken else y) for x, y in labelled()]
    return fitted(network(outputs=3), batches, functional.cross_entropy)


@fault("loss", "GG909")
def a_class_is_the_padding(broken: bool) -> RunLog:
    """ignore_index is 0, which is a class of its own here."""

    def loss_of(output: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(output, y, ignore_index=0 if broken else -100)

    return fitted(network(outputs=3), labelled(), loss_of)


# --- what is learned ----------------------------------------------------------------------------


@fault("loss", "GG910", since=10)
def views_pulled_together(broken: bool) -> RunLog:
    """Two views of a sample are pulled together, and nothing keeps the samples apart."""
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8)
    with gg.watch(model, optimizer, detail_every=10) as guard:
        for _ in range(60):
            x = torch.randn(32, 8)
            output = model(torch.cat([x, x + torch.randn(32, 8)]))
            left, right = output.chunk(2)
            loss = (left - right).square().mean()
            if not broken:
                spread = output.var(0).add(1e-6).sqrt()
                loss = loss + (1 - spread).relu().mean()
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@fault("loss", "GG911")
def layers_without_activation(broken: bool) -> RunLog:
    """Three linear layers with nothing between them."""
    bend: list[nn.Module] = [nn.Identity() if broken else nn.ReLU() for _ in range(2)]
    layers = (nn.Linear(8, 16), bend[0], nn.Linear(16, 16), bend[1], nn.Linear(16, 1))
    return fitted(nn.Sequential(*layers), regression(STEPS), functional.mse_loss)


@fault("loss", "GG911")
def layers_without_activation_nobody_keeps(broken: bool) -> RunLog:
    """The same below a cross entropy, where the output is not kept in a variable."""
    bend: list[nn.Module] = [nn.Identity() if broken else nn.ReLU() for _ in range(2)]
    layers = (nn.Linear(8, 16), bend[0], nn.Linear(16, 16), bend[1], nn.Linear(16, 3))
    return fitted(nn.Sequential(*layers), labelled(), functional.cross_entropy, hold=False)


@fault("loss", "GG912")
def loss_of_the_truth(broken: bool) -> RunLog:
    """The loss compares each prediction with the target of the next row."""

    def loss_of(output: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(output, y.roll(1, 0) if broken else y)

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(STEPS)):
            if index == 0:
                guard.probe("loss at truth", loss_of(y, y))
            loss = loss_of(model(x), y)
            guard.observe(loss=loss, targets=y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log

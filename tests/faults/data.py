"""Faults of the data, of numbers in it, and of units that begin dead."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import fault, network

Batch = tuple[Tensor, Tensor]
STEPS = 8


def classes(rows: int = 256, *, inputs: int = 8) -> Batch:
    """Return inputs and labels of three classes."""
    x = torch.randn(rows, inputs)
    return x, (x @ torch.randn(inputs, 3) + 0.1 * torch.randn(rows, 3)).argmax(1)


def cut(x: Tensor, y: Tensor, rows: int = 32) -> list[Batch]:
    """Return a data set in batches, in order."""
    return [(x[i : i + rows], y[i : i + rows]) for i in range(0, len(x), rows)]


def fit(
    model: nn.Module,
    batches: list[Batch],
    *,
    epochs: int = 1,
    validation: list[Batch] | None = None,
    rate: float = 1e-2,
) -> RunLog:
    """Train a classifier with loaders, targets and losses shown to the guard."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    with gg.watch(model, optimizer) as guard:
        for _ in range(epochs):
            for x, y in guard.batches(batches):
                output = model(x)
                loss = functional.cross_entropy(output, y)
                guard.observe(loss=loss, targets=y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                for x, _ in guard.batches(validation or [], split="validation"):
                    model(x)
            model.train()
    return guard.log


@fault("data", "GG1001", place="targets", since=8)
def labels_shuffled_every_epoch(broken: bool) -> RunLog:
    """The labels are permuted without their inputs in every epoch."""
    x, y = classes()
    model = network(outputs=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for _ in range(3):
            order = torch.randperm(len(x))
            labels = y[torch.randperm(len(x))] if broken else y[order]
            for inputs, targets in guard.batches(cut(x[order], labels)):
                loss = functional.cross_entropy(model(inputs), targets)
                guard.observe(loss=loss, targets=targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return guard.log


@fault("data", "GG1002", place="targets")
def sorted_by_class(broken: bool) -> RunLog:
    """A folder of images is read class by class, without shuffling."""
    x, y = classes(384)
    y = torch.arange(384) // 128
    order = torch.arange(384) if broken else torch.randperm(384)
    x = x + functional.one_hot(y, 8)
    return fit(network(outputs=3), cut(x[order], y[order]))


@fault("data", "GG1003", place="inputs")
def integer_division_of_images(broken: bool) -> RunLog:
    """Pixels are divided by 256 as integers: all are 0."""
    pixels = torch.randint(0, 256, (256, 64))
    y = (pixels[:, :8].sum(1) > 1024).long()
    x = (pixels // 256).float() if broken else pixels / 255
    return fit(network(inputs=64, outputs=2), cut(x, y))


@fault("data", "GG1003", place="inputs")
def the_same_row_is_read(broken: bool) -> RunLog:
    """A reader returns its first row for every index."""
    x, y = classes()
    return fit(network(outputs=3), cut(x[:1].expand(256, -1).clone() if broken else x, y))


@fault("data", "GG1004", place="0")
def one_feature_in_metres(broken: bool) -> RunLog:
    """One feature is given in millimetres beside others of size 1."""
    x, y = classes()
    if broken:
        x = x * torch.tensor([5e4, 1, 1, 1, 1, 1, 1, 1])
    return fit(network(outputs=3), cut(x, y))


@fault("data", "GG1005", place="inputs")
def divided_by_255_twice(broken: bool) -> RunLog:
    """Images are scaled in the data set and in the collate function."""
    x = torch.rand(256, 64)
    x[:, 0] = 1.0
    y = (x[:, :8].sum(1) > 4).long()
    return fit(network(inputs=64, outputs=2), cut(x / 255 if broken else x, y), rate=1e-3)


@fault("data", "GG1006", place="inputs")
def rows_repeat_within_batches(broken: bool) -> RunLog:
    """All workers share one seed: each sample is drawn four times."""
    x, y = classes()
    order = torch.randperm(256)
    if broken:
        order = torch.randperm(256)[:64].repeat_interleave(4)
    return fit(network(outputs=3), cut(x[order], y[order]))


@fault("data", "GG1007", place="validation")
def validation_rows_from_training(broken: bool) -> RunLog:
    """Samples are duplicated before the split."""
    x, y = classes(320)
    held = (x[:64], y[:64]) if broken else (x[256:], y[256:])
    return fit(network(outputs=3), cut(x[:256], y[:256]), epochs=2, validation=cut(*held))


@fault("data", "GG1010", place="validation")
def validation_is_not_normalised(broken: bool) -> RunLog:
    """The training split is standardised, the validation split is not."""
    x, y = classes(384)
    raw = x * 40 + 300
    held = (raw if broken else x)[256:]
    return fit(network(outputs=3), cut(x[:256], y[:256]), validation=cut(held, y[256:]))


class Attentive(nn.Module):
    """A token classifier with one attention layer."""

    def __init__(self, *, inverted: bool) -> None:
        super().__init__()
        self.inverted = inverted
        self.embedding = nn.Embedding(20, 16, padding_idx=0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores of every text."""
        padded = tokens == 0
        hidden = self.embedding(tokens)
        mask = ~padded if self.inverted else padded
        mixed, _ = self.attention(hidden, hidden, hidden, key_padding_mask=mask, need_weights=False)
        scores: Tensor = self.head(mixed[:, 0])
        return scores


@fault("data", "GG1008", place="attention")
def padding_mask_is_inverted(broken: bool) -> RunLog:
    """True is taken to mean "attend", where it means "ignore"."""
    tokens = torch.randint(1, 20, (256, 12))
    tokens[:, 8:] = 0
    y = tokens[:, 0] % 3
    return fit(Attentive(inverted=broken), cut(tokens, y))


@fault("precision", "GG204", place="inputs")
def times_in_bfloat16(broken: bool) -> RunLog:
    """Seconds since midnight are cast to bfloat16 before they are scaled."""
    times = 40_000 + torch.rand(256, 8) * 300
    y = (times[:, 0] > 40_150).long()
    x = times.bfloat16() if broken else ((times - 40_150) / 87).bfloat16()
    model = nn.Sequential(nn.BatchNorm1d(8), network(outputs=2)).bfloat16()
    return fit(model, cut(x, y))


@fault("numerics", "GG603", place="inputs")
def missing_values_are_nan(broken: bool) -> RunLog:
    """A reader leaves NaN for missing values."""
    x, y = classes()
    if broken:
        x[::16, 3] = torch.nan
    return fit(network(outputs=3), cut(x, y))


@fault("gradient handling", "GG708")
def losses_add_up(broken: bool) -> RunLog:
    """A running total of losses is back-propagated instead of the last loss."""
    model = nn.Linear(8, 3)  # with a second layer torch would refuse: its weight has changed since
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    total = torch.zeros(())
    with gg.watch(model, optimizer) as guard:
        for x, y in cut(*classes()):
            loss = functional.cross_entropy(model(x), y)
            total = total + loss if broken else loss
            total.backward(retain_graph=broken)
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss.detach())
    return guard.log


@fault("init", "GG1102", place="1")
def bias_far_below_zero(broken: bool) -> RunLog:
    """A bias of -20 switches every unit of the first layer off."""
    model = network(outputs=3)
    if broken:
        nn.init.constant_(model[0].bias, -20.0)
    return fit(model, cut(*classes()))


@fault("init", "GG1103", "GG1104", place="")
def tanh_saturated_from_the_start(broken: bool) -> RunLog:
    """Weights of size 30 drive every tanh to its bounds."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    if broken:
        nn.init.normal_(model[0].weight, std=30.0)
    return fit(model, cut(*classes()))

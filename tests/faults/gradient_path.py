"""Faults of the path from the loss to the parameters, of the loss itself and of the initial weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import fault, network, regression, squared_error
from tests.faults.optimizer import trained


class TwoParts(nn.Module):
    """An encoder and a head, with something in between."""

    def __init__(self, between: object) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(8, 16), nn.Linear(16, 1)
        self._between = between

    def forward(self, x: Tensor) -> Tensor:
        assert callable(self._between)
        output: Tensor = self.head(self._between(self.encoder(x).relu()))
        return output


def _through(between: object) -> RunLog:
    model = TwoParts(between)
    return trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@fault("gradient path", "GG501", place="encoder")
def encoder_detached(broken: bool) -> RunLog:
    """The encoder's output is detached."""
    return _through(Tensor.detach if broken else Tensor.contiguous)


@fault("gradient path", "GG501", place="encoder")
def encoder_through_numpy(broken: bool) -> RunLog:
    """The encoder's output takes a way through numpy."""
    return _through(lambda h: torch.from_numpy(h.detach().numpy()) if broken else h)


@fault("gradient path", "GG501", place="encoder")
def encoder_wrapped_anew(broken: bool) -> RunLog:
    """The encoder's output is wrapped in a new tensor."""
    return _through(lambda h: torch.tensor(h.tolist()) if broken else h)


@fault("gradient path", "GG502", place="encoder")
def encoder_rounded(broken: bool) -> RunLog:
    """The encoder's output is rounded."""
    return _through(lambda h: (4 * h).round() / 4 if broken else h)


@fault("gradient path", "GG502", place="encoder")
def encoder_thresholded(broken: bool) -> RunLog:
    """The encoder's output is compared with a threshold."""
    return _through(lambda h: h.sign() if broken else h)


@fault("gradient path", "GG501", "GG506", place="spare")
def module_is_never_used(broken: bool) -> RunLog:
    """A module is built and takes part in no loss."""

    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = network(), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.body(x)
            return output if broken else output + self.spare(x)

    model = Spare()
    return trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@fault("loss", "GG906", place="align")
def term_always_zero(broken: bool) -> RunLog:
    """A term of the loss is 0 for every input."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            output = model(x)
            fit, align = squared_error(output, y), output.square().mean() * (0.0 if broken else 1.0)
            (fit + 0.1 * align).backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=fit + 0.1 * align, terms={"fit": fit, "align": align})
    return guard.log


@fault("loss", "GG906", place="smooth")
def term_never_added(broken: bool) -> RunLog:
    """A term of the loss is computed and left out of the sum."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            output = model(x)
            fit, smooth = squared_error(output, y), output.square().mean()
            loss = fit if broken else fit + 0.1 * smooth
            guard.observe(loss=loss, terms={"fit": fit, "smooth": smooth})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@fault("init", "GG1101", place="0.weight")
def constant_weights(broken: bool) -> RunLog:
    """All weights of the first layer begin at 0.1."""
    model = network()
    if broken:
        nn.init.constant_(model[0].weight, 0.1)
    return trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@fault("checkpoint", "GG1403", place="head")
def tie_broken_by_loading(broken: bool) -> RunLog:
    """Embedding and output layer held one tensor, and hold two after loading."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.head(self.table(x))
            return output

    model = Words()
    if broken:
        model.head.weight = nn.Parameter(model.table.weight.detach().clone())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for _ in range(10):
            words = torch.randint(12, (16,))
            loss = nn.functional.cross_entropy(model(words), (words + 1) % 12)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log

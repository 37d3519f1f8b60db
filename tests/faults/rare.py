"""Faults that are rarer than their families' others: one for each rule that no other loop of the zoo meets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import fault, network, regression, squared_error
from tests.faults.data import classes, cut, fit
from tests.faults.optimizer import trained


def _scaled_run(
    scale: float, *, ask: bool = False, lr: float = 1e-2, plan: gg.Plan | None = None
) -> RunLog:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with gg.watch(model, optimizer, scaler=scaler, plan=plan) as guard:
        for x, y in regression(10):
            with torch.autocast("cpu", dtype=torch.float16):
                output = model(x)
            loss = squared_error(output.float(), y)
            guard.observe(loss=loss)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if ask:
                found = scaler._per_optimizer_states[optimizer]["found_inf_per_device"]
                assert not any(flag.item() for flag in found.values())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return guard.log


@fault("amp", "GG103", place="optimizer")
def scale_is_a_divisor(broken: bool) -> RunLog:
    """The loss scale is set to what the loss should be divided by."""
    return _scaled_run(1 / 1024 if broken else 1024.0)


@fault("amp", "GG108", place="optimizer")
def scaler_asked_by_the_optimizer(broken: bool) -> RunLog:
    """An overflow check looks the optimizer itself up in the scaler's table."""
    return _scaled_run(1024.0, ask=broken)


@fault("optimizer", "GG304", place="0", since=3)
def frozen_for_an_evaluation(broken: bool) -> RunLog:
    """The first layer is frozen in mid-run and never switched on again."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer, detail_every=2) as guard:
        for index, (x, y) in enumerate(regression(12)):
            if broken and index == 3:
                model[0].requires_grad_(False)
            loss = squared_error(model(x), y)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@fault("optimizer", "GG312", place="optimizer", since=12)
def one_gradient_fills_the_second_moment(broken: bool) -> RunLog:
    """One outlier in the targets, and a second moment that remembers it for a thousand steps."""
    model = network()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.999)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(48)):
            y = y + 3.0 * torch.sin(7.0 * x[:, :1])  # stays hard: gradients keep their size
            if broken and index == 12:
                y = y + 1e6
            loss = squared_error(model(x), y)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@fault("optimizer", "GG313", place="4")
def head_lacks_the_word(broken: bool) -> RunLog:
    """Groups are made by a word in the name, which one part of the head lacks."""
    model = network()
    head = [model[2], *([] if broken else [model[4]])]
    rest = [model[0], *([model[4]] if broken else [])]
    groups = [
        {"params": [p for module in part for p in module.parameters()], "lr": rate}
        for part, rate in ((rest, 1e-3), (head, 4e-3))
    ]
    optimizer = torch.optim.AdamW(groups)
    with gg.watch(model, optimizer, plan=gg.Plan(groups={"head": ("2.", "4.")})) as guard:
        for x, y in regression(6):
            loss = squared_error(model(x), y)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@fault("schedule", "GG404", place="CosineAnnealingLR")
def cosine_for_another_run(broken: bool) -> RunLog:
    """The cosine is made for the epochs of the paper."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000 if broken else 12)
    with gg.watch(model, optimizer, plan=gg.Plan(steps=12)) as guard:
        for x, y in regression(12):
            loss = squared_error(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return guard.log


class HalfSquare(torch.autograd.Function):
    """x squared, with the derivative of half of it."""

    @staticmethod
    def forward(ctx: object, x: Tensor, factor: float) -> Tensor:
        """Return the square."""
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        ctx.factor = factor  # type: ignore[attr-defined]
        return x * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the derivative, with ``factor`` where 2 is right."""
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return ctx.factor * x * gradient, None  # type: ignore[attr-defined]


@fault("gradient path", "GG503", place="0.weight")
def factor_of_two_is_missing(broken: bool) -> RunLog:
    """A hand-written backward forgets a factor; a finite difference is told to the guard."""
    model = network()
    weight = model[0].weight
    factor = 1.0 if broken else 2.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return HalfSquare.apply(model(x) - y, factor).mean()

    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(6)):
            loss = loss_of(x, y)
            loss.backward()
            if index == 0:
                with torch.no_grad():
                    slope = weight.grad.square().sum()
                    weight += 1e-3 * weight.grad
                    above = loss_of(x, y)
                    weight -= 2e-3 * weight.grad
                    numeric = (above - loss_of(x, y)) / 2e-3
                    weight += 1e-3 * weight.grad
                off = (slope - numeric).abs() / torch.maximum(slope, numeric)
                guard.probe("wrong backward", off, parameter="0.weight", op="HalfSquare")
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@fault("gradient path", "GG504", place="2.weight")
def hook_of_an_experiment(broken: bool) -> RunLog:
    """A hook of an earlier experiment multiplies a gradient by 0."""
    model = network()
    model[2].weight.register_hook(lambda gradient: gradient * (0.0 if broken else 1.0))
    return trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


class Adapter(nn.Module):
    """A frozen layer with a low-rank correction."""

    def __init__(self, *, both_zero: bool) -> None:
        super().__init__()
        self.base = network(outputs=8)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
        self.head = nn.Linear(8, 1)
        nn.init.zeros_(self.up.weight)
        if both_zero:
            nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the corrected output."""
        output: Tensor = self.head(self.base(x) + self.up(self.down(x)))
        return output


@fault("gradient path", "GG505", place="down")
def both_factors_begin_at_zero(broken: bool) -> RunLog:
    """Both factors of an adapter are initialised to zero."""
    model = Adapter(both_zero=broken)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return trained(model, torch.optim.AdamW(trainable, lr=1e-2))


@fault("numerics", "GG604", since=0)
def eps_of_zero(broken: bool) -> RunLog:
    """Adam without eps meets a feature that is always zero: 0 / 0."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=0.0 if broken else 1e-8)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(8):
            x[:, 3] = 0.0
            loss = squared_error(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


class Poisoned(torch.autograd.Function):
    """The identity, with one infinite entry in its derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        """Return a copy."""
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        """Return the derivative with an Inf in front."""
        gradient = gradient.clone()
        gradient.view(-1)[0] = torch.inf
        return gradient


class Broken(nn.Module):
    """A perceptron in which the gradient of the middle weight can break."""

    def __init__(self, *, broken: bool) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self._broken = broken

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        weight = self.middle.weight
        weight = Poisoned.apply(weight) if self._broken else weight
        hidden = functional.linear(self.first(x).relu(), weight, self.middle.bias).relu()
        output: Tensor = self.last(hidden)
        return output


@fault("numerics", "GG606", place="middle.weight")
def clipping_spreads_one_inf(broken: bool) -> RunLog:
    """One gradient is Inf, and clipping by the total norm ruins all of them."""
    model = Broken(broken=broken)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(6):
            loss = squared_error(model(x), y)
            guard.observe(loss=loss)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


def _deep(layers: int, activation: Callable[[], nn.Module], gain: float) -> nn.Sequential:
    parts: list[nn.Module] = []
    for index in range(layers):
        linear = nn.Linear(8 if index == 0 else 16, 16)
        nn.init.normal_(linear.weight, std=gain / linear.in_features**0.5)
        parts += [linear, activation()]
    return nn.Sequential(*parts, nn.Linear(16, 1))


@fault("numerics", "GG607", place="0.weight")
def twelve_sigmoids(broken: bool) -> RunLog:
    """Twelve layers with sigmoids: each passes on a quarter of the gradient at most."""
    model = _deep(12, nn.Sigmoid, 1.0) if broken else _deep(12, nn.ReLU, 1.41)
    return trained(model, torch.optim.SGD(model.parameters(), lr=1e-2))


class Sine(nn.Module):
    """The sine of a multiple of the input."""

    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        """Return values between -1 and 1."""
        return torch.sin(self.frequency * x)


@fault("numerics", "GG608", place="0.weight")
def sines_without_their_initialisation(broken: bool) -> RunLog:
    """Sine layers of frequency 30 on default weights: bounded forwards, every backward twenty times larger."""
    model = _deep(8, lambda: Sine(30.0 if broken else 1.0), 1.0)
    return trained(model, torch.optim.AdamW(model.parameters(), lr=1e-4))


@fault("gradient handling", "GG705", place="optimizer")
def clipped_after_the_step(broken: bool) -> RunLog:
    """Clipping stands behind the step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer, plan=gg.Plan(max_gradient_norm=0.1)) as guard:
        for x, y in regression(10):
            loss = squared_error(model(x), 3 * y + 2)
            guard.observe(loss=loss)
            loss.backward()
            if not broken:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.zero_grad()
    return guard.log


@fault("data", "GG1011", place="pseudo-labels")
def pseudo_labels_of_another_order(broken: bool) -> RunLog:
    """Pseudo-labels of a teacher are read in another order than the inputs."""
    x, y = classes()
    pseudo = y[torch.randperm(len(y))] if broken else y
    model = network(outputs=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    agreement = (pseudo == y).float().mean()
    chance = torch.stack([(y == c).float().mean() ** 2 for c in range(3)]).sum()
    with gg.watch(model, optimizer) as guard:
        guard.probe("at chance", agreement / chance, op="pseudo-labels")
        for inputs, targets in cut(x, pseudo):
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@fault("precision", "GG201", place="0.weight")
def half_precision_without_a_scaler(broken: bool) -> RunLog:
    """float16 autocast without a loss scaler, and a loss that is divided by a million tokens."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=not broken)
    with gg.watch(model, optimizer, scaler=scaler) as guard:
        for x, y in regression(8):
            with torch.autocast("cpu", dtype=torch.float16):
                output = model(x)
            loss = squared_error(output.float(), y) / 2**20
            guard.observe(loss=loss)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return guard.log


class Bag(nn.Module):
    """A classifier of short texts by the mean of their embeddings."""

    def __init__(self, *, padding: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16, padding_idx=padding)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores of every text."""
        scores: Tensor = self.head(self.embedding(tokens).mean(1))
        return scores


@fault("data", "GG1009", place="embedding")
def padding_index_is_a_word(broken: bool) -> RunLog:
    """padding_idx is 1, the most frequent word; padding is 0."""
    tokens = torch.randint(1, 20, (256, 12))
    tokens[torch.rand(256, 12) < 0.2] = 1
    tokens[:, 9:] = 0
    y = tokens[:, :9].sum(1) % 3
    return fit(Bag(padding=1 if broken else 0), cut(tokens, y))

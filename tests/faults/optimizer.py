"""Faults of precision, of the optimizer's parameters and hyper-parameters, and of the schedule."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import fault, network, regression, squared_error


def trained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 12,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    per_step: int = 1,
    sign: float = 1.0,
) -> RunLog:
    """Train the plain way, with the guard on."""
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(steps):
            loss = squared_error(model(x), y)
            guard.observe(loss=loss)
            (sign * loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            for _ in range(per_step if scheduler is not None else 0):
                scheduler.step()
    return guard.log


@fault("precision", "GG202")
def bf16_weights_too_coarse(broken: bool) -> RunLog:
    """The update is below half a unit in the last place of bfloat16 weights."""
    model = network(64)
    model = model.bfloat16() if broken else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4 if broken else 1e-2)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            dtype = torch.bfloat16 if broken else torch.float32
            loss = squared_error(model(x.to(dtype)), y.to(dtype)).float()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("precision", "GG203")
def eps_is_zero_in_fp16(broken: bool) -> RunLog:
    """Adam's eps of 1e-8 is 0 in float16: a zero gradient becomes 0/0."""
    model = network().half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-8 if broken else 1e-4)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            loss = squared_error(model(x.half()), y.half()).float()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("optimizer", "GG301", place="4")
def head_not_in_the_optimizer(broken: bool) -> RunLog:
    """The last layer is in no parameter group."""
    model = network()
    held = list(model[:4].parameters()) if broken else list(model.parameters())
    return trained(model, torch.optim.AdamW(held, lr=1e-2))


@fault("optimizer", "GG301", place="scale")
def late_parameter_not_in_the_optimizer(broken: bool) -> RunLog:
    """A parameter is added to the model after the optimizer was made."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.body(x)
            return output * self.scale if hasattr(self, "scale") else output

    model = Scaled()
    if not broken:
        model.scale = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if broken:
        model.scale = nn.Parameter(torch.ones(1))
    return trained(model, optimizer)


@fault("optimizer", "GG302")
def head_replaced_after_the_optimizer(broken: bool) -> RunLog:
    """The head is replaced, and the optimizer still holds the old one."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model[4] = nn.Linear(16, 1)
    if not broken:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return trained(model, optimizer)


@fault("optimizer", "GG302")
def optimizer_of_another_copy(broken: bool) -> RunLog:
    """The model was copied after the optimizer was made; the copy is trained."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if broken:
        model = copy.deepcopy(model)
    return trained(model, optimizer)


@fault("optimizer", "GG303", place="layers")
def layers_in_a_plain_list(broken: bool) -> RunLog:
    """Layers in a Python list are used in the forward and trained by nobody."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Linear(8, 8) for _ in range(3)]
            self.layers = layers if broken else nn.ModuleList(layers)
            self.last = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            output: Tensor = self.last(x)
            return output

    model = Stack()
    return trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@fault("optimizer", "GG305", place="group 1")
def group_with_learning_rate_zero(broken: bool) -> RunLog:
    """One parameter group was left with a learning rate of 0."""
    model = network()
    groups = [
        {"params": model[:4].parameters(), "lr": 1e-2},
        {"params": model[4].parameters(), "lr": 0.0 if broken else 1e-2},
    ]
    return trained(model, torch.optim.AdamW(groups))


@fault("optimizer", "GG305")
def every_rate_zero(broken: bool) -> RunLog:
    """A schedule multiplies every learning rate by 0."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    factor = 0.0 if broken else 1.0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: factor)
    return trained(model, optimizer, scheduler=scheduler)


@fault("optimizer", "GG306")
def learning_rate_of_nothing(broken: bool) -> RunLog:
    """The learning rate is five orders of magnitude too small."""
    model = network()
    return trained(model, torch.optim.SGD(model.parameters(), lr=1e-8 if broken else 1e-2))


@fault("optimizer", "GG307")
def learning_rate_far_too_high(broken: bool) -> RunLog:
    """The learning rate throws the weights about."""
    model = network()
    return trained(model, torch.optim.SGD(model.parameters(), lr=30.0 if broken else 1e-2))


@fault("optimizer", "GG308")
def weight_decay_of_ten(broken: bool) -> RunLog:
    """Weight decay takes a tenth of every weight at every step."""
    model = network()
    decay = 10.0 if broken else 0.01
    return trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay))


@fault("optimizer", "GG309", since=1)
def moments_forgotten_every_step(broken: bool) -> RunLog:
    """The optimizer's state is cleared before every step."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            loss = squared_error(model(x), y)
            loss.backward()
            if broken:
                optimizer.state.clear()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("optimizer", "GG310")
def loss_is_maximised(broken: bool) -> RunLog:
    """The negative of the loss is differentiated."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return trained(model, optimizer, sign=-1.0 if broken else 1.0)


@fault("schedule", "GG401")
def scheduler_stepped_four_times(broken: bool) -> RunLog:
    """A schedule made for optimizer steps is advanced for every micro-batch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
    return trained(model, optimizer, steps=16, scheduler=scheduler, per_step=4 if broken else 1)


@fault("schedule", "GG402")
def rate_collapses(broken: bool) -> RunLog:
    """An exponential schedule made for epochs is stepped with every batch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-2)
    gamma = 0.3 if broken else 0.999
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=gamma)
    return trained(model, optimizer, steps=16, scheduler=scheduler)


@fault("schedule", "GG403")
def schedule_of_another_optimizer(broken: bool) -> RunLog:
    """The schedule changes the rates of an optimizer that is never stepped."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    other = torch.optim.SGD(model.parameters(), lr=1e-2)
    chosen = other if broken else optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(chosen, step_size=4, gamma=0.5)
    return trained(model, optimizer, scheduler=scheduler)

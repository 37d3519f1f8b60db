"""Healthy runs that tempt a rule."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import healthy, network, regression, squared_error
from tests.faults.optimizer import trained


@healthy
def plain_sgd() -> RunLog:
    """Nothing special."""
    model = network()
    return trained(model, torch.optim.SGD(model.parameters(), lr=1e-2), steps=30)


@healthy
def frozen_backbone() -> RunLog:
    """Only the head is trained; everything is handed to the optimizer."""
    model = network()
    model[:4].requires_grad_(False)
    return trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@healthy
def adapter_from_zero() -> RunLog:
    """A low-rank adapter whose second factor begins at zero, beside a frozen layer."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(8, 1).requires_grad_(False)
            self.down, self.up = nn.Linear(8, 4, bias=False), nn.Linear(4, 1, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.base(x) + self.up(self.down(x))
            return output

    model = Adapted()
    held = [p for p in model.parameters() if p.requires_grad]
    return trained(model, torch.optim.AdamW(held, lr=1e-2))


@healthy
def first_overflows() -> RunLog:
    """The loss scale settles from 2**24."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    with gg.watch(model, optimizer, scaler=scaler) as guard:
        for x, y in regression(24):
            with torch.autocast("cpu", dtype=torch.float16):
                output = model(x)
            loss = squared_error(output.float(), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@healthy
def warm_up_from_zero() -> RunLog:
    """The first steps have a learning rate of (almost) nothing."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    return trained(model, optimizer, steps=24, scheduler=scheduler)


@healthy
def cosine_to_zero() -> RunLog:
    """The schedule ends at zero, and a few steps follow."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: max(0.0, 1 - s / 20))
    return trained(model, optimizer, steps=26, scheduler=scheduler)


@healthy
def plateau_at_the_optimum() -> RunLog:
    """The loss has reached its floor and stays there."""
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(32, 8)
    y = model(x).detach() + 0.1
    with gg.watch(model, optimizer) as guard:
        for _ in range(80):
            loss = squared_error(model(x), y)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@healthy
def bf16_that_is_fine() -> RunLog:
    """bfloat16 weights with a rate that moves them."""
    model = network(64).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(20):
            loss = squared_error(model(x.bfloat16()), y.bfloat16()).float()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@healthy
def right_accumulation() -> RunLog:
    """Four micro-steps of a quarter each, zeroed in place."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(guard.batches(regression(40))):
            loss = squared_error(model(x), y)
            guard.observe(loss=loss)
            (loss / 4).backward()
            if index % 4 == 3:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
    return guard.log


@healthy
def generator_and_critic() -> RunLog:
    """Two optimizers take turns; the critic steps more often."""
    model = nn.ModuleDict({"generator": network(8, 4, 4), "critic": network(8, 4, 1)})
    optimizers = {
        "generator": torch.optim.Adam(model["generator"].parameters(), lr=1e-3),
        "critic": torch.optim.Adam(model["critic"].parameters(), lr=1e-3),
    }
    with gg.watch(model, optimizers) as guard:
        for index in range(24):
            fake = model["generator"](torch.randn(16, 4))
            optimizers["critic"].zero_grad()
            true = model["critic"](torch.randn(16, 4) + 2)
            loss = nn.functional.softplus(model["critic"](fake.detach())).mean()
            loss = loss + nn.functional.softplus(-true).mean()
            loss.backward()
            optimizers["critic"].step()
            guard.observe(loss=loss, optimizer="critic")
            if index % 3 == 2:
                optimizers["generator"].zero_grad()
                loss = nn.functional.softplus(-model["critic"](fake)).mean()
                loss.backward()
                optimizers["generator"].step()
                guard.observe(loss=loss, optimizer="generator")
    return guard.log


@healthy
def heads_in_turn() -> RunLog:
    """Two heads are trained in turn by one optimizer."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 16)
            self.heads = nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 1)])

        def forward(self, x: Tensor, head: int) -> Tensor:
            output: Tensor = self.heads[head](self.body(x).relu())
            return output

    model = Heads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(24)):
            loss = squared_error(model(x, index % 2), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@healthy
def sparse_embedding() -> RunLog:
    """Sparse gradients of an embedding, of which few rows are used."""
    model = nn.EmbeddingBag(500, 8, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for _ in range(20):
            loss = model(torch.randint(500, (8, 4))).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@healthy
def tied_weights() -> RunLog:
    """Embedding and output layer are one tensor."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.head(self.table(x))
            return output

    model = Words()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for _ in range(20):
            words = torch.randint(12, (16,))
            loss = nn.functional.cross_entropy(model(words), (words + 1) % 12)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@healthy
def teacher_and_student() -> RunLog:
    """A frozen teacher inside the watched model."""
    student = network()
    model = nn.ModuleDict({"teacher": copy.deepcopy(student), "student": student})
    model["teacher"].requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    nn.init.normal_(model["teacher"][4].weight)
    with gg.watch(model, optimizer) as guard:
        for x, _ in regression(20):
            loss = squared_error(model["student"](x), model["teacher"](x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@healthy
def transformer_layers_cloned() -> RunLog:
    """torch's encoder begins with equal layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for _ in range(12):
            x = torch.randn(4, 5, 8)
            loss = squared_error(model(x).mean(1), x.mean((1, 2)).unsqueeze(1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@healthy
def closure_of_lbfgs() -> RunLog:
    """LBFGS computes its gradients inside of the step."""
    model = nn.Linear(8, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    x = torch.randn(32, 8)
    y = x.sum(1, keepdim=True)
    with gg.watch(model, optimizer) as guard:
        for _ in range(8):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = squared_error(model(x), y)
                loss.backward()
                return loss

            guard.observe(loss=optimizer.step(closure))
    return guard.log


@healthy
def satisfied_hinge() -> RunLog:
    """A term of the loss becomes 0 and stays there."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(30):
            output = model(x)
            fit, hinge = squared_error(output, y), (output.abs().mean() - 0.05).relu()
            loss = fit + hinge
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss, terms={"fit": fit, "hinge": hinge})
    return guard.log


@healthy
def active_clipping() -> RunLog:
    """Clipping takes half of every gradient."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(30):
            loss = squared_error(model(x), 3 * y)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss, gradient_norm=norm)
    return guard.log


@healthy
def very_small_but_right_rate() -> RunLog:
    """Fine-tuning with Adam at 1e-5."""
    model = network()
    return trained(model, torch.optim.Adam(model.parameters(), lr=1e-5), steps=30)

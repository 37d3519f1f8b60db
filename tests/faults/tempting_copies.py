"""Healthy runs with copies, checkpoints and data that look odd."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import healthy, network, regression
from tests.faults.copies_and_reports import fit, follow
from tests.faults.data import classes, cut
from tests.faults.data import fit as classify


@healthy
def slow_average() -> RunLog:
    """An average with decay 0.9999 lags far behind."""
    model = network()
    average = copy.deepcopy(model)
    return fit(
        model,
        steps=120,
        after=lambda _g, _s: follow(average, model, 0.9999),
        averaged=average,
        detail_every=25,
    )


@healthy
def target_network_replaced_now_and_then() -> RunLog:
    """A target network stands still for 40 steps and is then replaced."""
    model = network()
    target = copy.deepcopy(model)

    def after(guard: gg.Guard, step: int) -> None:
        if step == 0:
            guard.follow_copy("target", target)
        if step % 40 == 39:
            target.load_state_dict(model.state_dict())

    return fit(model, steps=130, after=after, detail_every=20)


@healthy
def average_from_the_middle_on() -> RunLog:
    """SWA begins after 30 of 60 steps, as AveragedModel does it."""
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model)

    def after(_guard: gg.Guard, step: int) -> None:
        if step >= 30:
            average.update_parameters(model)

    return fit(model, steps=60, after=after, averaged=average, detail_every=10)


@healthy
def adapter_is_loaded() -> RunLog:
    """A checkpoint holds a few of the keys, and all of them are known."""
    model = network()
    state = {k: v.clone() for k, v in network().state_dict().items() if k.startswith("4.")}
    return fit(model, before=lambda _: model.load_state_dict(state, strict=False) and None)


@healthy
def head_is_replaced() -> RunLog:
    """Pretrained weights are loaded and the head is initialised anew before that."""
    model = network(outputs=3)
    state = {k: v.clone() for k, v in network(outputs=3).state_dict().items() if k[0] != "4"}
    x, y = classes()
    model.load_state_dict(state, strict=False)
    return classify(model, cut(x, y))


@healthy
def validated_with_the_average() -> RunLog:
    """The average's weights are swapped in for validation and swapped back."""
    model = network()
    average = copy.deepcopy(model)
    x, y = next(regression(1))

    def after(guard: gg.Guard, step: int) -> None:
        follow(average, model)
        if step % 3 == 2:
            kept = copy.deepcopy(model.state_dict())
            model.load_state_dict(average.state_dict())
            with torch.no_grad():
                value = functional.mse_loss(model(x), y)
            guard.report("loss", value, split="validation", weights="averaged")
            model.load_state_dict(kept)

    return fit(model, after=after, averaged=average)


@healthy
def memorised_accuracy() -> RunLog:
    """The accuracy on a small set is 1.0 for many reports."""
    report = lambda guard, _step: guard.report("accuracy", 1.0, split="validation")  # noqa: E731
    return fit(network(), after=report)


@healthy
def second_optimizer_for_the_loss_weights() -> RunLog:
    """A second optimizer, unwatched, steps one temperature of the model."""
    model = network()
    model.register_parameter("temperature", nn.Parameter(torch.ones(())))
    net = [p for n, p in model.named_parameters() if n != "temperature"]
    first = torch.optim.AdamW(net, lr=1e-2)
    second = torch.optim.AdamW([model.temperature], lr=1e-3)
    with gg.watch(model, {"net": first, "temperature": second}) as guard:
        for x, y in regression(10):
            loss = functional.mse_loss(model(x) * model.temperature, y)
            guard.observe(loss=loss)
            loss.backward()
            for one in (first, second):
                one.step()
                one.zero_grad()
    return guard.log


@healthy
def small_set_memorised_on_purpose() -> RunLog:
    """One batch is shown again and again."""
    x, y = classes(32)
    return classify(network(outputs=3), cut(x, y), epochs=20)


@healthy
def bag_of_words() -> RunLog:
    """Sparse counts: nearly all inputs are zero and many rows repeat features."""
    x = torch.poisson(torch.full((256, 64), 0.05))
    return classify(network(inputs=64, outputs=3), cut(x, x[:, :3].argmax(1)))


@healthy
def unbalanced_classes() -> RunLog:
    """Nine in ten samples are of one class."""
    x, _ = classes()
    y = (x[:, 0] > 1.28).long()
    return classify(network(outputs=2), cut(x, y), epochs=2)


@healthy
def images_in_0_to_1() -> RunLog:
    """Images are scaled to 0..1 and not centred."""
    x = torch.rand(256, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    return classify(net, cut(x, (x.mean((1, 2, 3)) > 0.5).long()), rate=1e-3)

"""Schedulers are found without being handed over, and described as they were made."""

from __future__ import annotations

import gc
import math
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from gradguard.schedulers import find_schedulers
from gradguard.testing import training_fingerprint


def loop():
    """Return a model and its optimizer."""
    net = nn.Linear(3, 2)
    return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def ids(net):
    """Return the ids of the model's parameters."""
    return {id(parameter) for parameter in net.parameters()}


def only(optimizer, name="main"):
    """Return the one scheduler that changes the rates of ``optimizer``."""
    (found,) = [one for one in find_schedulers({name: optimizer}) if one.optimizer == name]
    return found


SIMPLE = {
    "CosineAnnealingLR": (lambda o: lr_scheduler.CosineAnnealingLR(o, 40, 0.01), 40),
    "OneCycleLR": (lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=30), 30),
    "LinearLR": (lambda o: lr_scheduler.LinearLR(o, total_iters=7), 7),
    "ConstantLR": (lambda o: lr_scheduler.ConstantLR(o, total_iters=9), 9),
    "PolynomialLR": (lambda o: lr_scheduler.PolynomialLR(o, total_iters=11), 11),
    "StepLR": (lambda o: lr_scheduler.StepLR(o, 10, gamma=0.5), None),
    "LambdaLR": (lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0), None),
    "ReduceLROnPlateau": (lr_scheduler.ReduceLROnPlateau, None),
    "CosineAnnealingWarmRestarts": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5), None),
    "CyclicLR": (lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.3), None),
}


@pytest.mark.parametrize("kind", SIMPLE)
def test_each_kind_is_found_with_its_length(kind):
    """A scheduler of every kind is found by the name of its optimizer, with its planned steps."""
    net, optimizer = loop()
    make, planned = SIMPLE[kind]
    scheduler = make(optimizer)
    found = only(optimizer)
    facts = found.facts(ids(net))
    assert (found.kind, facts.kind, facts.optimizer) == (kind, kind, "main")
    assert facts.planned_steps == planned
    assert found.last_epoch == scheduler.last_epoch == facts.settings["last_epoch"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 40, 0.01), {"T_max": 40, "eta_min": 0.01}),
        (lambda o: lr_scheduler.StepLR(o, 10, gamma=0.5), {"step_size": 10, "gamma": 0.5}),
        (
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 2),
            {"T_0": 5, "T_mult": 2, "eta_min": 0.0},
        ),
        (
            lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=30),
            {"total_steps": 30, "max_lr": 0.5},
        ),
        (lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.3), {"max_lr": 0.3}),
        (lambda o: lr_scheduler.ConstantLR(o, 0.25, 4), {"factor": 0.25, "total_iters": 4}),
        (
            lambda o: lr_scheduler.ReduceLROnPlateau(o, mode="max", patience=3, min_lr=1e-5),
            {"mode_max": 1.0, "patience": 3, "min_lr": 1e-5, "factor": 0.1},
        ),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o), {"mode_max": 0.0}),
    ],
)
def test_settings_are_those_it_was_made_with(make, expected):
    """Settings are numbers under the names of torch's arguments."""
    net, optimizer = loop()
    scheduler = make(optimizer)
    settings = only(optimizer).facts(ids(net)).settings
    assert {name: settings[name] for name in expected} == pytest.approx(expected)
    assert all(type(value) is float for value in settings.values())
    assert "shares_parameters" not in settings
    del scheduler


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=2, max_size=4), open_end=st.booleans())
def test_the_parts_of_a_sequence_are_not_listed(lengths, open_end):
    """A sequence is one scheduler; it lasts until its last milestone and then as long as its last part."""
    _, optimizer = loop()
    parts = [lr_scheduler.ConstantLR(optimizer, total_iters=n) for n in lengths]
    if open_end:
        parts[-1] = lr_scheduler.ExponentialLR(optimizer, 0.9)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
    sequence = lr_scheduler.SequentialLR(optimizer, parts, milestones=ends)
    found = only(optimizer)
    assert found.kind == "SequentialLR"
    assert found.facts(set()).planned_steps == (None if open_end else sum(lengths))
    del sequence


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4), open_end=st.booleans())
def test_a_chain_lasts_as_long_as_its_longest_part(lengths, open_end):
    """Parts of a chain run side by side; one without an end leaves the chain open."""
    _, optimizer = loop()
    parts = [lr_scheduler.ConstantLR(optimizer, total_iters=n) for n in lengths]
    if open_end:
        parts.append(lr_scheduler.ExponentialLR(optimizer, 0.9))
    chain = lr_scheduler.ChainedScheduler(parts)
    found = only(optimizer)
    assert found.kind == "ChainedScheduler"
    assert found.facts(set()).planned_steps == (None if open_end else max(lengths))
    del chain


def test_the_part_of_a_users_wrapper_is_not_listed():
    """A scheduler that a user's own scheduler drives is part of that one."""

    class WarmUp(lr_scheduler.LRScheduler):
        def __init__(self, optimizer, after):
            self.after = after
            super().__init__(optimizer)

        def get_lr(self):
            return [group["lr"] for group in self.optimizer.param_groups]

    _, optimizer = loop()
    wrapper = WarmUp(optimizer, lr_scheduler.StepLR(optimizer, 10))
    assert only(optimizer).kind == "WarmUp"
    del wrapper


@pytest.mark.parametrize("shared", [True, False])
def test_a_scheduler_of_another_optimizer_has_no_name(shared):
    """One bound to an optimizer that is not watched says whether that holds the model's parameters."""
    net, optimizer = loop()
    parameters = net.parameters() if shared else [nn.Parameter(torch.zeros(2))]
    stale = torch.optim.SGD(parameters, lr=0.1)
    scheduler = lr_scheduler.StepLR(stale, 12_345)
    found = [one.facts(ids(net)) for one in find_schedulers({"main": optimizer})]
    (facts,) = [one for one in found if one.settings.get("step_size") == 12_345]
    assert facts.optimizer is None
    assert facts.settings["shares_parameters"] == float(shared)
    del scheduler


def test_the_optimizer_inside_a_wrapper_is_recognised():
    """The scheduler of the inner optimizer belongs to the wrapper that was handed over."""

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    _, optimizer = loop()
    scheduler = lr_scheduler.StepLR(optimizer, 10)
    assert only(Wrapper(optimizer)).kind == "StepLR"
    del scheduler


def test_several_optimizers_keep_their_order():
    """Schedulers come in the order of the optimizers, those of others last."""
    (_, first), (_, second), (_, other) = loop(), loop(), loop()
    made = [lr_scheduler.StepLR(one, 10) for one in (other, second, first, second)]
    names = [one.optimizer for one in find_schedulers({"a": first, "b": second})]
    assert names[:3] == ["a", "b", "b"]
    assert set(names[3:]) == {None}
    del made


def test_last_epoch_follows_the_scheduler_until_it_is_gone():
    """The count is read anew each time; a found scheduler does not keep it alive."""
    net, optimizer = loop()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 40)
    found = only(optimizer)
    optimizer.step()
    scheduler.step()
    assert found.last_epoch == 1
    gone = weakref.ref(scheduler)
    del scheduler
    gc.collect()
    assert gone() is None
    assert found.last_epoch is None
    facts = found.facts(ids(net))
    assert (facts.kind, facts.planned_steps, facts.settings) == ("CosineAnnealingLR", 40, {})


def test_dead_proxies_in_memory_do_no_harm():
    """A weak proxy whose object is gone is stepped over, not asked for its class."""
    _, optimizer = loop()
    target = nn.Linear(1, 1)
    proxy = weakref.proxy(target)
    del target
    gc.collect()
    scheduler = lr_scheduler.StepLR(optimizer, 10)
    assert only(optimizer).kind == "StepLR"
    del proxy, scheduler


def test_a_rate_without_end_is_open():
    """A length that is not finite is no length."""
    _, optimizer = loop()
    scheduler = lr_scheduler.ConstantLR(optimizer, total_iters=math.inf)
    assert only(optimizer).facts(set()).planned_steps is None
    del scheduler


def test_looking_changes_nothing():
    """Model, optimizer, random state and scheduler have the same bits before and after."""
    net, optimizer = loop()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 40)
    before = training_fingerprint(net, optimizer), pickle.dumps(scheduler.state_dict())
    for found in find_schedulers({"main": optimizer}):
        found.facts(ids(net))
    assert (training_fingerprint(net, optimizer), pickle.dumps(scheduler.state_dict())) == before

"""The neutrality check sees every bit that matters, and says which one changed."""

from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from gradguard.testing.neutrality import (
    TrainingRun,
    assert_neutral,
    fingerprint_parts,
    training_fingerprint,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def make_run() -> TrainingRun:
    """Build a run with a buffer, dropout, moments and a scaler: everything a fingerprint covers."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(observer: object) -> None:
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, 4)).pow(2).mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    return TrainingRun(model=model, optimizers=optimizer, scaler=scaler, step=step)


def fingerprint(run: TrainingRun) -> str:
    """Return the fingerprint of a run."""
    return training_fingerprint(run.model, run.optimizers, run.scaler)


def _shrink_a_weight(run: TrainingRun) -> None:
    with torch.no_grad():
        run.model[0].weight.view(torch.int32)[0, 0] ^= 1


def _negate_a_zero(run: TrainingRun) -> None:
    run.model[1].running_mean[0] = -0.0


def _touch_a_gradient(run: TrainingRun) -> None:
    run.model[0].bias.grad = torch.zeros(6)


def _touch_a_moment(run: TrainingRun) -> None:
    run.optimizers.state[run.model[0].weight]["exp_avg"] = torch.ones(())


CHANGES: dict[str, Callable[[TrainingRun], object]] = {
    "parameter 0.weight": _shrink_a_weight,
    "buffer 1.running_mean": _negate_a_zero,
    "gradient of 0.bias": _touch_a_gradient,
    "train mode of 2": lambda run: run.model[2].eval(),
    "state of optimizer optimizer": _touch_a_moment,
    "state of the scaler": lambda run: run.scaler.update(3.0),
    "Python random state": lambda run: random.random(),
    "NumPy random state": lambda run: np.random.rand(),
    "torch random state": lambda run: torch.rand(1),
}


@pytest.mark.parametrize("part", CHANGES)
def test_every_part_is_seen_and_named(part: str) -> None:
    """A change of one bit anywhere changes the fingerprint, in the part of that name alone."""
    run = make_run()
    run.scaler.scale(torch.ones(()))  # its state exists from the first scale() on
    before, whole = fingerprint_parts(run.model, run.optimizers, run.scaler), fingerprint(run)
    CHANGES[part](run)
    after = fingerprint_parts(run.model, run.optimizers, run.scaler)
    assert [name for name in after if after[name] != before[name]] == [part]
    assert fingerprint(run) != whole


def test_taking_a_fingerprint_changes_nothing() -> None:
    """Two fingerprints in a row are equal, and the run goes on as if none had been taken."""
    assert_neutral(make_run, lambda run: _each_step(lambda: fingerprint(run)), steps=3)
    run = make_run()
    assert fingerprint(run) == fingerprint(run)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_every_kind_of_tensor_has_a_fingerprint() -> None:
    """Half, fp8, complex, conjugated, empty, scalar, transposed and sparse tensors are hashed."""
    model = nn.Module()
    tensors = {
        "fp16": torch.ones(2, dtype=torch.float16),
        "fp8": torch.ones(2).to(torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "empty": torch.ones(0, 3),
        "scalar": torch.ones(()),
        "transposed": torch.ones(2, 3).T,
        "coo": torch.eye(2).to_sparse(),
        "csr": torch.eye(2).to_sparse_csr(),
        "csc": torch.eye(2).to_sparse_csc(),
    }
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    parts = fingerprint_parts(model, {})
    model.fp16.fill_(2)
    changed = fingerprint_parts(model, {})
    assert [name for name in changed if changed[name] != parts[name]] == ["buffer fp16"]


def test_values_without_bits_are_refused() -> None:
    """A value whose bits are undefined is an error, not something silently left out."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["schedule"] = object()
    with pytest.raises(TypeError, match="fingerprint of a object: it has no defined bits"):
        training_fingerprint(nn.Module(), optimizer)


@contextmanager
def _each_step(action: Callable[[], object]) -> Iterator[None]:
    """An observer that acts after every forward pass of any module."""
    handle = nn.modules.module.register_module_forward_hook(lambda *_: action() and None)
    try:
        yield
    finally:
        handle.remove()


def test_a_neutral_observer_passes() -> None:
    """An observer that only looks passes."""
    assert_neutral(make_run, lambda run: nullcontext(), steps=3)


def test_drawing_from_the_global_generator_is_caught() -> None:
    """A meter that samples from the global generator is caught and the changed parts are named."""
    with pytest.raises(AssertionError, match=r"training was changed: torch random state"):
        assert_neutral(make_run, lambda run: _each_step(lambda: torch.rand(1)), steps=2)


def test_a_run_that_cannot_be_repeated_is_told_apart() -> None:
    """When the bare run itself is not repeatable, the run is blamed and not the observer."""
    model = nn.Linear(2, 1)  # outside make_run: goes on from where the last run ended

    def make() -> TrainingRun:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(observer: object) -> None:
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

        return TrainingRun(model=model, optimizers=optimizer, step=step)

    with pytest.raises(AssertionError, match="the bare run is not repeatable: parameter weight"):
        assert_neutral(make, lambda run: nullcontext(), steps=1)


def test_the_step_receives_what_observe_yields() -> None:
    """The bare run's step is given None, the observed run's the value of the context manager."""
    seen: list[object] = []
    model = nn.Linear(1, 1, bias=False)
    make = lambda: TrainingRun(model=model, optimizers={}, step=seen.append)  # noqa: E731
    assert_neutral(make, lambda run: nullcontext("guard"), steps=2)
    assert seen == [None, None, "guard", "guard"]


def test_the_caller_keeps_its_random_state() -> None:
    """The check puts the global random state back."""
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert_neutral(make_run, lambda run: nullcontext(), steps=1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected

"""The order contract: no policy of the sanitizer can turn a skipped step into a taken one."""

from __future__ import annotations

from functools import partial
from math import inf

import pytest
import torch
from torch import nn

from gradguard.sanitize import sanitize_gradients_
from gradguard.testing import (
    is_neutral_on_clean_steps,
    never_hides_an_overflow,
    training_fingerprint,
)

NAN = float("nan")
zero_nan = partial(sanitize_gradients_, policy="zero_nan", max_fraction=1.0)
report = partial(sanitize_gradients_, policy="report")


def published_sanitizer(parameters: list[nn.Parameter]) -> None:
    """What the published trainer did: NaN to 0, infinities to 1 and -1."""
    for parameter in parameters:
        parameter.grad = torch.nan_to_num(parameter.grad, nan=0.0, posinf=1.0, neginf=-1.0)


def published_fix(parameters: list[nn.Parameter]) -> None:
    """What replaced it: NaN to 0, infinities kept."""
    for parameter in parameters:
        parameter.grad = torch.nan_to_num(parameter.grad, nan=0.0, posinf=inf, neginf=-inf)


test_zero_nan_never_hides_an_overflow = never_hides_an_overflow(zero_nan, with_scaler=True)
test_report_never_hides_an_overflow = never_hides_an_overflow(report, with_scaler=True)
test_zero_nan_is_neutral_under_a_scaler = is_neutral_on_clean_steps(zero_nan, with_scaler=True)
test_report_without_a_scaler_hides_nothing = never_hides_an_overflow(partial(report, scaler=None))


def test_the_published_sanitizer_hides_overflows() -> None:
    """The published bug is found, with a counterexample of one entry."""
    with pytest.raises(AssertionError, match=r"gradient \[-?(inf|nan)\]: the scaler alone skips"):
        never_hides_an_overflow(published_sanitizer)()


def test_the_published_fix_hides_overflows_too() -> None:
    """The published "fix" keeps Inf but still hides an overflow that shows up as NaN alone."""
    with pytest.raises(AssertionError, match=r"gradient \[nan\]: the scaler alone skips"):
        never_hides_an_overflow(published_fix)()


def test_leaving_out_the_scaler_is_what_the_property_catches() -> None:
    """Telling zero_nan that there is no scaler, where there is one, hides overflows: hence required."""
    with pytest.raises(AssertionError, match=r"gradient \[nan\]"):
        never_hides_an_overflow(partial(zero_nan, scaler=None))()
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'scaler'"):
        sanitize_gradients_([nn.Parameter(torch.ones(1))])


class Loop:
    """One parameter under SGD and a scaler, with a backward pass that leaves a given gradient."""

    def __init__(self, *, scale: float = 1024.0, enabled: bool = True, fused: bool = False) -> None:
        self.weight = nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
        self.sanitize = partial(
            zero_nan, [("w", self.weight)], scaler=self.scaler, optimizer=self.optimizer
        )

    def backward(self, *gradient: float) -> None:
        self.scaler.scale((self.weight * torch.tensor(gradient)).sum()).backward()

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("fused", [False, True])
def test_before_unscale_nothing_is_written(fused: bool) -> None:
    """At stage ready NaN stays, the report says why, and the scaler skips and lowers its scale."""
    loop = Loop(fused=fused)
    loop.backward(NAN, 1.0)
    found = loop.sanitize()
    assert (found.stage, found.decision_taken, found.zeroed, found.nan_count) == (
        "ready",
        False,
        0,
        1,
    )
    assert found.refused is not None
    assert found.refused.startswith(
        "1 of 2 gradient entries are NaN (first: w) and were left alone"
    )
    loop.step()
    assert loop.weight.tolist() == [0.0, 0.0]
    assert loop.scaler.get_scale() == 512.0


def test_a_clean_step_is_not_refused() -> None:
    """Before unscale_ a gradient without NaN is no reason to refuse anything."""
    loop = Loop()
    loop.backward(inf, 1.0)
    found = loop.sanitize()
    assert (found.refused, found.inf_count) == (None, 1)


@pytest.mark.parametrize("fused", [False, True])
def test_after_unscale_the_decision_is_taken(fused: bool) -> None:
    """After unscale_ NaN is zeroed, the report says that the decision stands, and it does."""
    loop = Loop(fused=fused)
    loop.backward(NAN, 1.0)
    loop.scaler.unscale_(loop.optimizer)
    found = loop.sanitize()
    assert (found.stage, found.decision_taken, found.zeroed) == ("unscaled", True, 1)
    assert loop.weight.grad.tolist() == [0.0, 1.0]
    loop.step()
    assert loop.weight.tolist() == [0.0, 0.0]
    assert loop.scaler.get_scale() == 512.0


def test_after_step_the_decision_is_taken() -> None:
    """Between step and update the stage is stepped, and writing is harmless."""
    loop = Loop()
    loop.backward(NAN, 1.0)
    loop.scaler.step(loop.optimizer)
    found = loop.sanitize()
    assert (found.stage, found.decision_taken, found.zeroed) == ("stepped", True, 1)


def test_nan_made_by_unscaling_itself_is_zeroed() -> None:
    """With a collapsed scale, unscaling writes NaN that the scaler does not see: zeroing it helps."""
    loop = Loop(scale=1e-45)
    loop.backward(1e-5, 1.0)  # the first underflows to 0, and 0 times 1/scale is NaN
    loop.scaler.unscale_(loop.optimizer)
    assert loop.weight.grad.isnan().tolist() == [True, False]
    assert loop.sanitize().zeroed == 1
    assert loop.weight.grad[0] == 0.0


def test_a_disabled_scaler_decides_nothing() -> None:
    """With GradScaler(enabled=False) nobody looks at the gradients, and NaN is zeroed."""
    loop = Loop(enabled=False)
    loop.backward(NAN, 1.0)
    found = loop.sanitize()
    assert (found.stage, found.decision_taken, found.zeroed) == ("disabled", False, 1)


def test_without_a_scaler_the_decision_is_unknown() -> None:
    """Without a scaler there is no stage and no decision to speak of: None, not False."""
    loop = Loop()
    loop.backward(1.0, 1.0)
    found = zero_nan([loop.weight], scaler=None)
    assert (found.stage, found.decision_taken) == (None, None)
    assert report([loop.weight], scaler=loop.scaler).decision_taken is None


def test_the_scaler_of_another_optimizer_is_not_ready_to_be_hidden_from() -> None:
    """A scaler that never saw this optimizer may still come to see it: nothing is written."""
    loop, other = Loop(), Loop()
    loop.backward(NAN, 1.0)
    other.scaler.scale(torch.ones(()))
    found = zero_nan([loop.weight], scaler=other.scaler, optimizer=loop.optimizer)
    assert (found.stage, found.zeroed) == ("ready", 0)


def test_parameters_of_another_optimizer_are_refused() -> None:
    """One optimizer's unscale_ says nothing about parameters of another: mixing them is an error."""
    loop = Loop()
    stranger = nn.Parameter(torch.zeros(1))
    loop.backward(1.0, 1.0)
    stranger.grad = torch.tensor([NAN])
    loop.scaler.unscale_(loop.optimizer)
    given = [("w", loop.weight), ("head", stranger)]
    with pytest.raises(ValueError, match="head is not in the optimizer given"):
        zero_nan(given, scaler=loop.scaler, optimizer=loop.optimizer)
    assert stranger.grad.isnan().all()


def test_zero_nan_wants_the_optimizer() -> None:
    """With a scaler the optimizer is needed to know the stage; leaving it out is an error."""
    loop = Loop()
    with pytest.raises(ValueError, match="zero_nan with a loss scaler needs the optimizer too"):
        zero_nan([loop.weight], scaler=loop.scaler)


def _half_precision_run(sanitizer: object, *, steps: int = 60) -> tuple[str, float, float]:
    """Train a normalised net in fp16 from a far too large scale; return hash, moved, scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 1))
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    x, y = torch.randn(32, 8), torch.randn(32, 1)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            output = model(x)
        scaler.scale((output.float() - y).pow(2).mean()).backward()
        if sanitizer is zero_nan:
            zero_nan(model.named_parameters(), scaler=scaler, optimizer=optimizer)
        elif sanitizer is not None:
            sanitizer(list(model.parameters()))
        scaler.step(optimizer)
        scaler.update()
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    fingerprint = training_fingerprint(model, optimizer, scaler)
    return fingerprint, float(torch.linalg.vector_norm(moved)), scaler.get_scale()


def test_real_half_precision_training_settles_as_without_sanitizer() -> None:
    """In real fp16 training zero_nan ends in the same bits; the published fix stands still."""
    bare, moved, scale = _half_precision_run(None)
    ours, _, _ = _half_precision_run(zero_nan)
    assert ours == bare
    assert moved > 0.1
    assert scale < 2.0**24
    _, moved_fixed, scale_fixed = _half_precision_run(published_fix)
    assert scale_fixed == 2.0**24, "the published fix keeps the scale that overflows"
    assert moved_fixed < 1e-3


def test_two_optimizers_are_judged_one_by_one() -> None:
    """When one of two optimizers is unscaled, its gradients may be written, the other's may not."""
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in (first, second)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((first * NAN + second * NAN).sum()).backward()
    scaler.unscale_(optimizers[0])
    assert zero_nan([first], scaler=scaler, optimizer=optimizers[0]).zeroed == 1
    assert zero_nan([second], scaler=scaler, optimizer=optimizers[1]).zeroed == 0
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(torch.cat((first, second)), torch.zeros(2))

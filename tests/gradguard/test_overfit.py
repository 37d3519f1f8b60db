"""What ``overfit_check`` promises: who can memorise a batch passes early; who cannot is told why."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.amp import GradScaler

from gradguard.checkup import CheckFailedError, OverfitReport
from gradguard.overfit import overfit_check
from gradguard.testing.neutrality import fingerprint_parts
from gradguard.views.preflight import overfit_view

from .check_cases import Job, Net, job, warmed


def run(given: Job, **options: object) -> OverfitReport:
    """Run the check on a job that returns the loss."""
    return overfit_check(given.model, given.optimizer, given.loss, scaler=given.scaler, **options)


def assert_failed(report: OverfitReport, *words: str) -> None:
    """Assert that the check failed with these words in its one sentence."""
    assert not report.ok
    assert report.exit_code == 1
    assert "\n" not in report.verdict
    for word in words:
        assert word in report.verdict
    with pytest.raises(CheckFailedError, match="overfit check"):
        report.raise_if_wrong()


# --- success -----------------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [False, True], ids=["loss", "step"])
@pytest.mark.parametrize("model", ["mlp", "batch norm", "tied weights"])
def test_a_right_model_memorises_the_batch_and_stops_early(model: str, complete: bool) -> None:
    """The check stops at the first loss that is low enough, and says where it was."""
    given = job(model, "AdamW", rows=4)
    step = given.complete if complete else given.loss
    report = overfit_check(given.model, given.optimizer, step)
    assert report.ok, str(report)
    assert report.exit_code == 0
    report.raise_if_wrong()
    assert report.steps < 300
    assert report.first is not None
    assert report.last is not None
    assert report.target == pytest.approx(0.1 * report.first)
    assert report.last == report.best
    assert report.last <= report.target
    assert report.fall is not None
    assert report.fall >= 0.9
    assert all(loss > report.target for _, loss in report.curve[:-1])
    assert report.diagnosis is None


def test_the_losses_are_those_of_a_plain_loop() -> None:
    """The curve is what the same loop gives without the check."""
    report = run(job("dropout", "AdamW"), steps=12, fall=0.999)
    given = job("dropout", "AdamW")
    plain = [float(given.complete().detach()) for _ in range(12)]
    assert [loss for _, loss in report.curve] == plain
    assert [step for step, _ in report.curve] == list(range(12))
    assert report.best == min(plain)


def test_half_precision_with_a_scaler_memorises_too() -> None:
    """Skipped steps while the loss scale settles do no harm."""
    given = job("mlp", "AdamW", scaler=GradScaler("cpu", init_scale=2.0**22), rows=4)
    assert run(given).ok


def test_a_floor_counts() -> None:
    """A loss that cannot fall below its floor is judged by its way there."""
    given = job("mlp", "AdamW", rows=4)

    def shifted() -> torch.Tensor:
        return given.loss() + 10.0

    assert overfit_check(given.model, given.optimizer, shifted, floor=10.0).ok
    assert not overfit_check(given.model, given.optimizer, shifted).ok


def test_a_long_curve_is_sampled_with_both_ends() -> None:
    """Of many losses at most 64 are kept, the first and the last among them, in order."""
    given = job(Net("detach"), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    report = overfit_check(given.model, given.optimizer, given.loss, steps=200)
    steps = [step for step, _ in report.curve]
    assert len(steps) <= 64
    assert steps[0] == 0
    assert steps[-1] == 199
    assert steps == sorted(set(steps))


# --- failure -----------------------------------------------------------------------------------


def test_a_learning_rate_of_zero_learns_nothing_and_is_diagnosed() -> None:
    """Nothing learnt: the verdict says so, and the rules name the cause."""
    model = Net()
    given = job(model, torch.optim.SGD(model.parameters(), lr=0.0))
    report = run(given, steps=20)
    assert_failed(report, "nothing is learnt", "does not fall")
    assert report.diagnosis is not None
    assert "GG305" in {cause.finding.code for cause in report.diagnosis.causes}
    assert "GG305" in str(report)


def test_a_loss_that_rises_is_said_to() -> None:
    """A maximised loss rises."""
    model = Net()
    given = job(model, torch.optim.SGD(model.parameters(), lr=0.01, maximize=True))
    assert_failed(run(given, steps=20), "it rose")


def test_a_slow_learner_is_told_to_go_on() -> None:
    """A loss that is still falling at the end is told from one that has stopped."""
    model = Net()
    given = job(model, torch.optim.SGD(model.parameters(), lr=0.02))
    assert_failed(run(given, steps=20), "still falling")


def test_a_plateau_is_said_to_be_one() -> None:
    """A loss that stays where it is although it fell at first points to what cannot learn."""
    given = job("mlp", "AdamW")

    def noisy_target() -> torch.Tensor:
        return (given.model(given.x).mean() - 3.0).square() + 4.0

    report = overfit_check(given.model, given.optimizer, noisy_target, steps=200)
    assert_failed(report, "no longer falls")


def test_a_loss_that_is_not_finite_ends_the_check() -> None:
    """NaN is no success: the check ends at once."""
    report = run(job(Net("nan")))
    assert_failed(report, "nan at step 0")
    assert report.steps == 1
    assert report.best is None
    assert report.fall is None


def test_a_loss_that_blows_up_ends_the_check() -> None:
    """A learning rate that is far too large ends in Inf or NaN, and the first loss is told."""
    model = nn.Linear(6, 2)
    given = job(model, torch.optim.SGD(model.parameters(), lr=1e6))
    report = run(given)
    assert_failed(report, "at first")
    assert report.last is not None
    assert not math.isfinite(report.last)


@pytest.mark.parametrize("offset", [0.0, -5.0])
def test_a_loss_at_the_floor_is_no_success(offset: float) -> None:
    """A loss that is 0 (or below the floor) from the start has nothing to learn from."""
    given = job()

    def empty() -> torch.Tensor:
        return given.model(given.x).sum() * 0 + offset

    assert_failed(
        overfit_check(given.model, given.optimizer, empty), "at or below the floor", "floor="
    )


def test_a_step_that_raises_or_returns_nothing_is_a_failure() -> None:
    """The exception, or the lack of a loss, is the verdict."""
    given = job()

    def raising() -> None:
        raise RuntimeError("no data\nat all")

    def silent() -> None:
        given.complete()

    assert_failed(overfit_check(given.model, given.optimizer, raising), "RuntimeError: no data")
    assert_failed(overfit_check(given.model, given.optimizer, silent), "returned no loss")
    assert_failed(overfit_check(given.model, given.optimizer, lambda: None), "did not step")


def test_wrong_arguments_are_errors_of_one_sentence() -> None:
    """Numbers out of range and things of the wrong kind are refused."""
    given = job()
    for options, words in (({"steps": 1}, "steps=1"), ({"fall": 1.0}, "fall=1.0"),
                           ({"fall": math.nan}, "fall=nan"), ({"floor": math.inf}, "floor=inf")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            run(given, **options)
    with pytest.raises(TypeError, match="Module"):
        overfit_check(given.x, given.optimizer, given.loss)
    with pytest.raises(TypeError, match="callable"):
        overfit_check(given.model, given.optimizer, None)
    frozen = Net().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        overfit_check(frozen, torch.optim.SGD(frozen.parameters(), lr=0.1), given.loss)


# --- what is left ------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("model", ["batch norm", "dropout"])
def test_everything_is_put_back_bit_for_bit(model: str, scaled: bool) -> None:
    """Weights, buffers, gradients, optimizer, scaler and random state are as they were."""
    scaler = GradScaler("cpu", growth_interval=3) if scaled else None
    given = warmed(job(model, "AdamW", scaler=scaler))
    before = fingerprint_parts(given.model, given.optimizer, scaler)
    assert run(given, steps=8).steps == 8
    assert fingerprint_parts(given.model, given.optimizer, scaler) == before


def test_an_interrupt_passes_and_everything_is_put_back() -> None:
    """Control-C is not swallowed, and leaves no trace."""
    given = warmed(job("batch norm", "AdamW"))
    before = fingerprint_parts(given.model, given.optimizer)
    calls: list[int] = []

    def step() -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return given.loss()

    with pytest.raises(KeyboardInterrupt):
        overfit_check(given.model, given.optimizer, step)
    assert fingerprint_parts(given.model, given.optimizer) == before


def test_what_was_learnt_can_be_kept() -> None:
    """With restore=False the weights are those that memorised the batch."""
    given = job("mlp", "AdamW", rows=4)
    report = run(given, restore=False)
    assert report.ok
    assert report.target is not None
    assert float(given.loss().detach()) <= report.target


def test_the_report_is_a_view_too() -> None:
    """Verdict, points of the curve and diagnosis are shown within the width."""
    model = Net()
    report = run(job(model, torch.optim.SGD(model.parameters(), lr=0.0)), steps=40)
    console = Console(width=90)
    with console.capture() as shown:
        console.print(overfit_view(report))
    text = shown.get()
    assert "nothing is learnt" in text
    assert "GG305" in text
    assert "39" in text
    assert max(map(len, text.splitlines())) <= 90

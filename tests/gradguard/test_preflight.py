"""What ``preflight`` promises: wrong models are told so in a sentence, right ones pass, nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.amp import GradScaler

from gradguard.checkup import CheckFailedError, PreflightReport
from gradguard.facts import Plan
from gradguard.preflight import preflight
from gradguard.testing.neutrality import fingerprint_parts
from gradguard.views.preflight import preflight_view

from .check_cases import MODELS, OPTIMIZERS, Job, Net, job, warmed


def wrong(report: PreflightReport, name: str, *words: str) -> None:
    """Assert that the named check failed, in one sentence with these words."""
    check = report.check(name)
    assert check.passed is False, str(report)
    assert "\n" not in check.message
    for word in words:
        assert word in check.message
    assert report.exit_code == 1
    assert not report.ok
    with pytest.raises(CheckFailedError, match=name):
        report.raise_if_wrong()


def run(given: Job, **options: object) -> PreflightReport:
    """Run preflight on a job that returns the loss."""
    return preflight(given.model, given.optimizer, given.loss, scaler=given.scaler, **options)


# --- right models ------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("complete", [False, True], ids=["loss", "step"])
def test_right_models_pass(model: str, optimizer: str, complete: bool) -> None:
    """A right model passes every question that is asked, whichever way the step is given."""
    given = job(model, optimizer)
    report = preflight(given.model, given.optimizer, given.complete if complete else given.loss)
    assert report.ok, str(report)
    assert report.exit_code == 0
    report.raise_if_wrong()
    assert report.diagnosis is not None
    assert report.diagnosis.healthy
    assert report.check("gradient").passed is (None if complete else True)


@pytest.mark.parametrize("scale", [2.0**8, 2.0**30])
@pytest.mark.parametrize("complete", [False, True], ids=["loss", "step"])
def test_a_settling_loss_scale_is_waited_for(scale: float, complete: bool) -> None:
    """Overflows at first are no fault: the scaler is given the attempts that it needs to settle."""
    given = job("batch norm", "AdamW", scaler=GradScaler("cpu", init_scale=scale))
    report = preflight(
        given.model,
        given.optimizer,
        given.complete if complete else given.loss,
        scaler=given.scaler,
    )
    assert report.ok, str(report)
    assert ("settled" in report.check("step").message) is (scale > 2.0**20)
    assert "float16" in report.check("gradient").message or complete


def test_a_gradient_in_float64_agrees_closely() -> None:
    """In float64 the gradient and the finite difference agree to four digits."""
    given = job("mlp", dtype=torch.float64)
    report = run(given)
    assert report.check("gradient").passed
    assert report.ok


def test_two_optimizers_are_one_loop() -> None:
    """Parameters may be shared out between optimizers given by name."""
    model = Net()
    optimizers = {
        "first": torch.optim.SGD(model.first.parameters(), lr=0.1),
        "last": torch.optim.Adam(model.last.parameters(), lr=0.01),
    }
    given = job(model, optimizers["first"])
    assert preflight(model, optimizers, given.loss).ok


def test_a_warm_up_from_zero_is_no_fault() -> None:
    """A learning rate of 0 that a schedule begins with is not called wrong, but said."""
    given = job("mlp", "SGD")
    schedule = torch.optim.lr_scheduler.LambdaLR(given.optimizer, lambda step: step / 10)
    report = run(given)
    assert report.check("motion").passed is None
    assert "schedule" in report.check("motion").message
    assert schedule.last_epoch == 0


@pytest.mark.parametrize("seed", range(4))
def test_cancelling_signs_are_no_dead_gradient(seed: int) -> None:
    """With an L1 loss the gradient of the last bias may cancel to exact zero on a batch: no fault."""
    torch.manual_seed(seed)
    model, x, y = nn.Linear(6, 1), torch.randn(2, 6), torch.tensor([[100.0], [-100.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    report = preflight(model, optimizer, lambda: F.l1_loss(model(x), y))
    assert report.ok, str(report)
    assert "bias is too faint" in report.check("motion").message


def test_layers_frozen_on_purpose_may_be_in_eval() -> None:
    """A normalisation whose weights are frozen is in eval mode on purpose."""
    given = job("batch norm")
    given.model[1].requires_grad_(False).eval()
    report = run(given, plan=Plan(frozen=("1.",)))
    assert report.check("modes").passed
    assert report.check("frozen").passed


# --- wrong models ------------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [False, True], ids=["loss", "step"])
def test_a_missing_parameter_is_named(complete: bool) -> None:
    """A parameter that the optimizer was not given is named."""
    model = Net()
    given = job(model, torch.optim.SGD(model.first.parameters(), lr=0.1))
    report = preflight(model, given.optimizer, given.complete if complete else given.loss)
    wrong(report, "optimizer", "last.weight", "last.bias", "no optimizer")
    assert report.check("optimizer").place == "last.weight"


def test_a_stale_optimizer_is_told_from_a_missing_parameter() -> None:
    """An optimizer made for another copy of the model is told to be made anew."""
    given = job(Net(), torch.optim.SGD(Net().parameters(), lr=0.1))
    report = run(given)
    wrong(report, "optimizer", "no longer has", "first.weight")


def test_foreign_parameters_are_counted() -> None:
    """Tensors that are not the model's are said to be so, with their number."""
    model, criterion = Net(), nn.Linear(1, 1)
    both = [*model.parameters(), *criterion.parameters()]
    report = run(job(model, torch.optim.SGD(both, lr=0.1)))
    wrong(report, "optimizer", "2 tensors", "not the model's")


def test_a_parameter_in_two_optimizers_is_named() -> None:
    """A parameter that two optimizers step is named."""
    model = Net()
    optimizers = {
        "all": torch.optim.SGD(model.parameters(), lr=0.1),
        "last": torch.optim.SGD(model.last.parameters(), lr=0.1),
    }
    report = preflight(model, optimizers, job(model, optimizers["all"]).loss)
    wrong(report, "optimizer", "last.weight", "more than once")


@pytest.mark.parametrize(("fault", "source"), [("detach", "h.detach()"), ("no_grad", "no_grad")])
def test_the_line_that_cuts_the_path_is_named(fault: str, source: str) -> None:
    """What the loss does not reach is named, and the line that cuts it, with its file."""
    report = run(job(Net(fault)))
    wrong(report, "paths", "first.weight, first.bias", "check_cases.py:", source)
    assert "check_cases.py:" in (report.check("paths").place or "")


def test_a_cut_path_is_seen_in_a_complete_step() -> None:
    """A complete step names the unreached parameters, too, and says how to learn the line."""
    given = job(Net("detach"))
    report = preflight(given.model, given.optimizer, given.complete)
    wrong(report, "paths", "first.weight, first.bias", "return only the loss")


def test_a_loss_without_a_graph_is_a_failed_step() -> None:
    """A loss that does not require grad at all fails with the reason, and the cut is named."""
    given = job()

    def step() -> torch.Tensor:
        return F.mse_loss(given.model(given.x).detach(), given.y)

    report = preflight(given.model, given.optimizer, step)
    wrong(report, "step", "does not require grad")
    wrong(report, "paths", "detach", "test_preflight.py:")


def test_a_learning_rate_of_zero_is_named() -> None:
    """Nothing moves with a learning rate of 0, and that is the reason given."""
    model = Net()
    report = run(job(model, torch.optim.SGD(model.parameters(), lr=0.0)))
    wrong(report, "motion", "first.weight", "learning rate is 0")


def test_updates_lost_to_rounding_are_seen() -> None:
    """In bfloat16 a tiny update is rounded away: the parameters get gradients and do not move."""
    model = Net().bfloat16()
    given = job(model, torch.optim.SGD(model.parameters(), lr=1e-9), dtype=torch.bfloat16)
    report = run(given)
    wrong(report, "motion", "rounding")
    assert report.check("gradient").passed is None


def test_a_dead_gradient_is_named() -> None:
    """A layer whose units are all dead has a gradient of exact zeros, step after step."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.constant_(model[0].bias, -100.0)
    report = run(job(model, torch.optim.SGD(model.parameters(), lr=0.01)))
    wrong(report, "motion", "0.weight", "exactly zero")


def test_a_frozen_model_cannot_train() -> None:
    """With every parameter frozen nothing is run, and the report says why."""
    model = Net().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = preflight(model, optimizer, lambda: pytest.fail("called"))
    wrong(report, "frozen", "requires_grad_(True)")
    assert [check.passed for check in report.checks[1:]] == [None] * (len(report.checks) - 1)


def test_what_is_frozen_beside_the_plan_is_wrong() -> None:
    """With a plan, a frozen parameter that it does not name is wrong, and so is one that trains against it."""
    given = job(Net())
    given.model.first.bias.requires_grad_(False)
    assert run(given).check("frozen").passed is None
    wrong(run(given, plan=Plan(frozen=("last",))), "frozen", "first.bias")
    wrong(run(given, plan=Plan(frozen=("first",))), "frozen", "first.weight", "although the plan")


def test_a_nonfinite_loss_is_traced_to_its_line() -> None:
    """A NaN loss fails, and the operation and line where it is born are named."""
    report = run(job(Net("nan")))
    wrong(report, "loss", "nan", "sqrt", "check_cases.py:")
    wrong(report, "finite", "first.weight")


def test_weights_that_are_not_finite_before_the_step_are_named() -> None:
    """A parameter that holds NaN from the start is named."""
    given = job(Net())
    with torch.no_grad():
        given.model.last.bias[0] = math.nan
    wrong(run(given), "finite", "last.bias", "before any step")


def test_a_gradient_that_never_fits_is_seen_through_the_scaler() -> None:
    """A gradient that is not finite at any loss scale is not taken for a settling one."""
    given = job(Net("nan"), scaler=GradScaler("cpu"))
    report = preflight(given.model, given.optimizer, given.complete, scaler=given.scaler)
    assert report.exit_code == 1
    wrong(report, "step", "skipped all")


@pytest.mark.parametrize("model", ["batch norm", "dropout"])
def test_layers_in_eval_mode_are_named(model: str) -> None:
    """A layer that behaves differently while training and runs in eval mode is named."""
    given = job(model)
    given.model.eval()
    report = run(given)
    wrong(report, "modes", "eval mode", "model.train()")
    assert not given.model.training


def test_a_step_that_switches_to_train_mode_itself_is_right() -> None:
    """The mode counts while the layers run, not before."""
    given = job("dropout")
    given.model.eval()

    def step() -> torch.Tensor:
        given.model.train()
        return given.loss()

    report = preflight(given.model, given.optimizer, step)
    assert report.check("modes").passed
    assert not given.model.training


def test_a_wrong_backward_is_named_with_its_factor() -> None:
    """A backward that forgot a factor of two is found by what comes before it."""
    report = run(job(Net("square")))
    wrong(report, "gradient", "first.weight, first.bias", "0.5 times")
    assert "last" not in report.check("gradient").message


def test_a_wrong_backward_can_be_meant() -> None:
    """With gradient=False the gradient is not compared."""
    report = run(job(Net("square")), gradient=False)
    assert report.ok, str(report)
    assert report.check("gradient").passed is None


def test_a_gradient_of_another_batch_is_not_compared() -> None:
    """A step that draws a new batch at every call has no finite differences, and no false alarm."""
    given = job()
    batches = torch.Generator().manual_seed(3)

    def step() -> torch.Tensor:
        return given.model(torch.randn(8, 6, generator=batches)).square().mean()

    report = preflight(given.model, given.optimizer, step)
    assert report.check("gradient").passed is None
    assert "another batch" in report.check("gradient").message


@pytest.mark.parametrize(
    ("truth", "passed"),
    [(lambda g: F.mse_loss(g.y, g.y), True), (lambda g: F.mse_loss(2 * g.y, g.y), False),
     (lambda g: math.nan, False), (lambda g: 1 / 0, False), (lambda g: "zero", False)],
    ids=["right", "scaled", "nan", "raises", "text"],
)  # fmt: skip
def test_the_loss_vanishes_at_the_truth(truth: Callable[[Job], object], passed: bool) -> None:
    """A loss that does not vanish where the answer is right is wrong, and so is one that cannot be computed."""
    given = job()
    report = run(given, truth=lambda: truth(given))
    assert report.check("truth").passed is passed
    assert report.ok is passed


def test_a_declared_floor_is_subtracted() -> None:
    """A loss whose smallest value is not 0 is right at the truth if the plan says so."""
    given = job()
    assert not run(given, truth=lambda: 0.5).check("truth").passed
    assert run(given, truth=lambda: 0.5, plan=Plan(floor=0.5)).check("truth").passed


# --- what step_fn may do wrong -----------------------------------------------------------------


def test_a_step_that_raises_is_a_failed_check() -> None:
    """The exception becomes a sentence, after everything was put back."""
    given = warmed(job("batch norm", "AdamW"))
    before = fingerprint_parts(given.model, given.optimizer)

    def step() -> None:
        given.complete()
        torch.zeros(3) @ torch.zeros(4)

    report = preflight(given.model, given.optimizer, step)
    wrong(report, "step", "RuntimeError", "put back")
    assert fingerprint_parts(given.model, given.optimizer) == before


def test_an_interrupt_passes_and_everything_is_put_back() -> None:
    """Control-C is not swallowed, and leaves no trace."""
    given = warmed(job("batch norm", "AdamW"))
    before = fingerprint_parts(given.model, given.optimizer)

    def step() -> None:
        given.complete()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preflight(given.model, given.optimizer, step)
    assert fingerprint_parts(given.model, given.optimizer) == before


def test_a_step_without_an_optimizer_step_is_told_so() -> None:
    """A backward pass without a step, or nothing at all, is a failed check of one sentence."""
    given = job()

    def backward_only() -> None:
        given.loss().backward()

    report = preflight(given.model, given.optimizer, backward_only)
    wrong(report, "step", "never stepped", "returned nothing")
    wrong(preflight(given.model, given.optimizer, lambda: None), "step", "did not step")
    wrong(preflight(given.model, given.optimizer, lambda: given.model(given.x)), "step", "(8, 2)")


def test_a_step_of_another_optimizer_is_told_so() -> None:
    """A loop that steps another optimizer object than the one given is wrong."""
    given = job()
    other = torch.optim.SGD(given.model.parameters(), lr=0.1)
    wrong(preflight(given.model, other, given.complete), "step", "that very optimizer")


def test_wrong_arguments_are_errors_of_one_sentence() -> None:
    """Every argument of a wrong kind is refused, with what came and what was expected."""
    given = job()
    calls: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (TypeError, "torch.nn.Module", lambda: preflight(given.x, given.optimizer, given.loss)),
        (TypeError, "Optimizer", lambda: preflight(given.model, 3, given.loss)),
        (TypeError, "callable", lambda: preflight(given.model, given.optimizer, given.loss())),
        (TypeError, "GradScaler", lambda: run(job(scaler="scaler"))),
        (TypeError, "truth", lambda: run(given, truth=0.0)),
        (ValueError, "empty mapping", lambda: preflight(given.model, {}, given.loss)),
        (ValueError, "no parameters", lambda: preflight(nn.ReLU(), given.optimizer, given.loss)),
    ]
    for kind, words, call in calls:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_lazy_model_must_be_run_first() -> None:
    """A lazy layer without a shape is refused with a sentence."""
    model = nn.Sequential(nn.LazyLinear(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="lazy"):
        preflight(model, optimizer, lambda: model(torch.ones(1, 6)).sum())


# --- neutrality --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fault", ["none", "fp16", "nan"])
@pytest.mark.parametrize("complete", [False, True], ids=["loss", "step"])
def test_everything_is_put_back_bit_for_bit(optimizer: str, fault: str, complete: bool) -> None:
    """Weights, buffers, gradients, modes, optimizer, scaler and random state are as they were."""
    scaler = GradScaler("cpu", init_scale=2.0**20) if fault == "fp16" else None
    model = Net("nan") if fault == "nan" else nn.Sequential(MODELS["batch norm"](), nn.Dropout(0.1))
    if fault != "nan":
        model[0][3] = nn.Sequential(nn.Dropout(0.3), nn.Linear(16, 2))
    given = warmed(job(model, OPTIMIZERS[optimizer](model), scaler=scaler))
    torch.manual_seed(5)
    before = fingerprint_parts(given.model, given.optimizer, scaler)
    gradients = [p.grad for p in given.model.parameters()]
    preflight(
        given.model,
        given.optimizer,
        given.complete if complete else given.loss,
        scaler=scaler,
        truth=lambda: torch.rand(()) * 0,
    )
    assert fingerprint_parts(given.model, given.optimizer, scaler) == before
    after = [p.grad for p in given.model.parameters()]
    assert all(old is new for old, new in zip(gradients, after, strict=True))


def test_the_next_steps_are_those_of_a_run_without_preflight() -> None:
    """A training run goes on to the same bits, with a schedule and a scaler, as if nothing had been."""

    def train(*, look: bool) -> dict[str, str]:
        given = warmed(job("dropout", "AdamW", scaler=GradScaler("cpu", growth_interval=2)))
        schedule = torch.optim.lr_scheduler.StepLR(given.optimizer, step_size=2)

        def step() -> torch.Tensor:
            loss = given.complete()
            schedule.step()
            return loss

        torch.manual_seed(7)
        if look:
            assert preflight(given.model, given.optimizer, step, scaler=given.scaler).diagnosis
        for _ in range(5):
            step()
        return fingerprint_parts(given.model, given.optimizer, given.scaler)

    assert train(look=True) == train(look=False)


def test_a_scaler_left_in_the_middle_of_a_step_is_put_back() -> None:
    """A step that raises between unscale_ and update leaves a scaler that can unscale again."""
    given = job(scaler=GradScaler("cpu"))

    def step() -> None:
        given.scaler.scale(given.loss()).backward()
        given.scaler.unscale_(given.optimizer)
        raise RuntimeError("in the middle")

    wrong(
        preflight(given.model, given.optimizer, step, scaler=given.scaler), "step", "in the middle"
    )
    given.complete()


def test_no_hook_stays() -> None:
    """Neither the model nor the optimizer keeps a hook of the check."""
    given = job("dropout")
    run(given)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in given.model.modules()]
    assert sum(hooks) == 0
    assert not given.optimizer._optimizer_step_pre_hooks
    assert not given.optimizer._optimizer_step_post_hooks


# --- the report --------------------------------------------------------------------------------


def test_the_report_reads_as_text_and_as_a_table() -> None:
    """Every check and the conclusion are in the text, and in the table at a fixed width."""
    report = run(job(Net("detach")))
    text = str(report)
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as shown:
        console.print(preflight_view(report))
    for check in report.checks:
        assert check.name in text
        assert check.name in shown.get()
    assert text.splitlines()[-1] == report.conclusion
    assert "paths, rules wrong" in shown.get()
    assert max(map(len, shown.get().splitlines())) <= 100


def test_an_unknown_check_is_an_error_that_names_the_known_ones() -> None:
    """Asking for a check that does not exist lists those that do."""
    with pytest.raises(KeyError, match="optimizer, step"):
        run(job()).check("speed")

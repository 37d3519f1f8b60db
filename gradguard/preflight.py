"""``preflight``: takes a step before the training does, says what is wrong, and puts everything back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from torch.amp import GradScaler
from torch.nn.parameter import UninitializedParameter

from gradguard.checkup import Check, PreflightReport
from gradguard.facts import Plan
from gradguard.scaler import check_scaler, innermost_optimizer
from gradguard.trials import checks as ask
from gradguard.trials.holders import read_holders
from gradguard.trials.onestep import StepFunction
from gradguard.trials.restoring import schedulers_of
from gradguard.trials.trial import Subject, run_trial


def preflight(
    model: nn.Module,
    optimizer: object,
    step_fn: StepFunction,
    *,
    scaler: GradScaler | None = None,
    plan: Plan | None = None,
    truth: Callable[[], object] | None = None,
    gradient: bool = True,
) -> PreflightReport:
    """Take a training step (up to three, until everything has moved) and say what is wrong with it.

    ::

        report = gg.preflight(model, optimizer, lambda: criterion(model(x), y))
        print(report)
        report.raise_if_wrong()

    Asked are: is every trainable parameter in the optimizer, once, and nothing else; is the loss finite; which
    parameters does it not reach, and which line cuts them; do layers run in eval mode by mistake; does the
    step move what it should; are weights and gradients finite; is the gradient that of the loss; does the loss
    vanish at the truth; what do the rules say. Then weights, buffers, gradients, modes, optimizer,
    schedulers, scaler and random state are put back, bit for bit. Call it before ``watch``.

    Args:
        model: what is trained.
        optimizer: the optimizer, or a mapping from name to optimizer.
        step_fn: without arguments; runs one complete training step, or returns the loss with its graph, and
            the rest is done here. Returning the loss answers more: the line of a cut, and the gradient.
            It is called several times and should use the same batch.
        scaler: the ``GradScaler`` of the step.
        plan: what you intend; ``frozen`` and ``floor`` are used.
        truth: returns the loss where the answer is right; it should be near 0 (or ``plan.floor``).
        gradient: False to leave out the comparison with finite differences (up to about 140 forward
            passes), and for a gradient that is another one on purpose.

    Returns:
        The answers. A ``step_fn`` that raises is one of them.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no parameters, no optimizer, or a lazy module that was never run.

    Memory: two copies of weights and optimizer state while it runs. Sync: waits for the device.
    """
    optimizers = checked_subject("preflight", model, optimizer, step_fn, scaler)
    if truth is not None and not callable(truth):
        raise TypeError(
            f"preflight(truth=...): expected a callable without arguments, got {type(truth).__name__}"
        )
    holders = read_holders(model, optimizers)
    frozen = ask.frozen_check(holders, plan)
    if not holders.trainable:
        rest = (ask.unasked(name, "nothing can train") for name in ask.NAMES[1:])
        return PreflightReport(checks=(frozen, *rest))
    subject = Subject(
        model=model,
        optimizers=optimizers,
        step_fn=step_fn,
        scaler=scaler,
        plan=plan,
        schedulers=schedulers_of(optimizers),
    )
    trial = run_trial(subject, holders.held, truth=truth, gradient=gradient)
    checks: tuple[Check, ...] = (
        frozen,
        ask.optimizer_check(holders, plan),
        ask.step_check(trial),
        ask.loss_check(trial),
        ask.paths_check(trial, holders, plan),
        ask.modes_check(trial),
        ask.motion_check(trial, holders),
        ask.finite_check(trial),
        ask.gradient_check(trial, wanted=gradient),
        ask.truth_check(trial, plan, wanted=truth is not None),
        ask.rules_check(trial),
    )
    return PreflightReport(checks=checks, diagnosis=trial.diagnosis)


def checked_subject(
    caller: str, model: object, optimizer: object, step_fn: object, scaler: object
) -> dict[str, object]:
    """Return the optimizers by name, after checking what a check is called with.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a model without parameters, or an empty mapping.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{caller}(): expected a torch.nn.Module as the model, got {type(model).__name__}"
        )
    if not callable(step_fn):
        raise TypeError(
            f"{caller}(): expected step_fn to be a callable without arguments, got "
            f"{type(step_fn).__name__}; wrap the step in a function or a lambda"
        )
    if next(model.parameters(), None) is None:
        raise ValueError(f"{caller}(): the model {type(model).__name__} has no parameters")
    lazy = next(
        (name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)),
        None,
    )
    if lazy is not None:
        raise ValueError(
            f"{caller}(): {lazy!r} has no shape yet; run the model once, so that its lazy modules have "
            "their weights, and make the optimizer then"
        )
    optimizers = dict(optimizer) if isinstance(optimizer, Mapping) else {"optimizer": optimizer}
    if not optimizers:
        raise ValueError(f"{caller}() got an empty mapping of optimizers; pass at least one")
    for one in optimizers.values():
        innermost_optimizer(one)
    if scaler is not None:
        check_scaler(scaler)
    return optimizers

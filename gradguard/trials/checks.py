"""Turns what a trial saw into answers: one question, one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradguard.checkup import Check
from gradguard.facts import Plan
from gradguard.findings import Severity
from gradguard.records import PathState, StepOutcome, StepRecord
from gradguard.trials.holders import Holders
from gradguard.trials.trial import Trial

NAMES = (
    "frozen",
    "optimizer",
    "step",
    "loss",
    "paths",
    "modes",
    "motion",
    "finite",
    "gradient",
    "truth",
    "rules",
)
"""The questions in the order in which they are answered."""

TRUTH_SHARE = 0.05
"""Up to which share of the model's loss the loss at the truth counts as near the floor."""

ROUNDING = 1e-3
"""Up to which share of the global gradient norm a gradient that moves nothing counts as rounding."""

_SHOWN = 4


def frozen_check(holders: Holders, plan: Plan | None) -> Check:
    """Say whether what is frozen is meant to be."""
    ask = _Question("frozen")
    if not holders.trainable:
        total = len(holders.frozen)
        return ask.wrong(
            f"none of the {total} parameters requires grad, so nothing can train; set "
            "requires_grad_(True) on what should"
        )
    declared = plan.frozen if plan is not None else ()
    if not declared:
        if not holders.frozen:
            return ask.right("every parameter requires grad")
        return ask.unknown(
            f"{listed(holders.frozen)} {_verb(holders.frozen, 'does', 'do')} not require grad; name "
            "what is frozen on purpose in plan=gg.Plan(frozen=...) to have this checked"
        )
    surprises = [name for name in holders.frozen if not name.startswith(declared)]
    thawed = [name for name in holders.held if name.startswith(declared)]
    if surprises:
        return ask.wrong(
            f"{listed(surprises)} {_verb(surprises, 'is', 'are')} frozen, but not by the plan",
            surprises[0],
        )
    if thawed:
        return ask.wrong(
            f"{listed(thawed)} {_verb(thawed, 'trains', 'train')} although the plan freezes "
            f"{_verb(thawed, 'it', 'them')}",
            thawed[0],
        )
    return ask.right("exactly what the plan says is frozen")


def optimizer_check(holders: Holders, plan: Plan | None) -> Check:
    """Say whether every trainable parameter is in an optimizer, once, and nothing else is."""
    ask = _Question("optimizer")
    declared = plan.frozen if plan is not None else ()
    missing = [n for n in holders.missing if not (declared and n.startswith(declared))]
    if missing and holders.foreign_like_missing:
        return ask.wrong(
            f"the optimizer holds {_tensors(holders.foreign)} that the model no longer has, and does "
            f"not hold {listed(missing)}: make the optimizer after the model is moved, loaded or changed",
            missing[0],
        )
    if missing:
        return ask.wrong(
            f"{listed(missing)} {_verb(missing, 'is', 'are')} trainable, but in no optimizer: make it from "
            "model.parameters() of the complete model, or call optimizer.add_param_group",
            missing[0],
        )
    if holders.twice:
        return ask.wrong(
            f"{listed(holders.twice)} {_verb(holders.twice, 'is', 'are')} stepped more than once: "
            "put every parameter into one group of one optimizer",
            holders.twice[0],
        )
    if holders.foreign:
        return ask.wrong(
            f"the optimizer holds {_tensors(holders.foreign)} that {_be(holders.foreign)} not the model's: "
            "pass the module that holds everything that trains, such as "
            "torch.nn.ModuleList([model, criterion])"
        )
    return ask.right(f"every trainable parameter is in it once ({len(holders.held)} in all)")


def step_check(trial: Trial) -> Check:
    """Say whether a step was taken at all."""
    ask = _Question("step")
    if trial.error is not None:
        return ask.wrong(f"step_fn failed, and everything was put back: {trial.error}")
    skipped = len(trial.records) - len(trial.taken)
    if not trial.taken:
        return ask.wrong(
            f"the loss scaler skipped all {skipped} attempts: the gradient is not finite at any loss scale"
        )
    if all(record.outcome is StepOutcome.NO_GRADIENT for record in trial.taken):
        return ask.wrong("the optimizer was stepped, and none of its parameters had a gradient")
    count = len(trial.taken)
    outcome = trial.taken[-1].outcome.value.lower().replace("_", " ")
    taken = f"{count} optimizer {'step was' if count == 1 else 'steps were'} taken ({outcome})"
    return ask.right(taken + (_settling(trial.records, skipped) if skipped else ""))


def _settling(records: Sequence[StepRecord], skipped: int) -> str:
    first, last = records[0].loss_scale_before, records[-1].loss_scale_before
    said = f", after {skipped} skipped ones while the loss scale settled"
    return said if first is None or last is None else f"{said} from {first:g} to {last:g}"


def loss_check(trial: Trial) -> Check:
    """Say whether the loss is a finite number."""
    ask = _Question("loss")
    if not trial.losses:
        return ask.unknown("step_fn returned no loss; return it to have it checked")
    bad = [loss for loss in trial.losses if not math.isfinite(loss)]
    if bad:
        at = "at the first step" if not math.isfinite(trial.losses[0]) else "after the first step"
        return ask.wrong(f"the loss is {bad[0]} {at}{_because(trial.origin)}")
    return ask.right(f"the loss is {trial.losses[0]:.4g}, which is finite")


def paths_check(trial: Trial, holders: Holders, plan: Plan | None) -> Check:
    """Say which trainable parameters the loss does not reach, and what cuts them."""
    ask = _Question("paths")
    declared = plan.frozen if plan is not None else ()
    cuts = {one.parameter: one for one in trial.cuts}
    lost = [name for name in holders.trainable if _is_lost(trial, name)]
    lost = [name for name in lost if not (declared and name.startswith(declared))]
    if not lost and not trial.taken:
        if trial.error is None or not cuts:
            return ask.unknown("no step was taken")
        lost = [name for name in holders.trainable if name in cuts]
    if not lost:
        return ask.right("the loss reaches every trainable parameter")
    what = f"the loss does not reach {listed(lost)}"
    # One sentence per place: what is cut at the same line is cut together.
    places = {(cut.line, cut.reason): cut for name in reversed(lost) if (cut := cuts.get(name))}
    if places:
        known = list(places.values())[::-1]
        said = "; ".join(str(cut).rstrip(".") for cut in known[:_SHOWN])
        return ask.wrong(f"{what}: {said}", known[0].line or lost[0])
    hint = "; let step_fn return only the loss to be told the line" if trial.completes else ""
    if trial.cut_error is not None:
        hint = f" (looking for the line failed with {trial.cut_error})"
    return ask.wrong(f"{what}{hint}", lost[0])


def _is_lost(trial: Trial, name: str) -> bool:
    """Whether neither the graph nor any backward pass reached a parameter."""
    states = trial.states(name)
    if trial.reach is not None and name in trial.reach.unreached:
        return not states - {PathState.NO_GRADIENT}
    return states == {PathState.NO_GRADIENT}


def modes_check(trial: Trial) -> Check:
    """Say whether layers that behave differently while training ran in eval mode."""
    ask = _Question("modes")
    if not trial.in_eval:
        return ask.right("no layer runs in eval mode by mistake")
    layers = [f"{kind} {name!r}" if name else f"the {kind}" for name, kind in trial.in_eval.items()]
    return ask.wrong(
        f"{listed(layers)} {_verb(layers, 'runs', 'run')} in eval mode: call model.train() before the step",
        next(iter(trial.in_eval)),
    )


def motion_check(trial: Trial, holders: Holders) -> Check:
    """Say whether the step moves every parameter that an optimizer holds and a gradient reaches."""
    ask = _Question("motion")
    if not any(record.parameters for record in trial.taken):
        return ask.unknown("no step was taken on parameters of the model")
    still = [name for name in holders.held if not trial.moved(name)]
    # What no gradient reaches is said under "paths".
    lost = [name for name in still if trial.states(name) == {PathState.NO_GRADIENT}]
    still = [name for name in still if name not in lost]
    faint = [name for name in still if _is_faint(trial, name)]
    still = [name for name in still if name not in faint]
    if not still:
        moved = sum(trial.moved(name) for name in holders.held)
        but = f"; the gradient of {listed(faint)} is too faint to" if faint else ""
        but += f"; no gradient reaches {listed(lost)}" if lost else ""
        return ask.right(f"the optimizer moves {moved} of {len(holders.held)} parameters{but}")
    dead = [name for name in still if trial.states(name) == {PathState.ZERO}]
    if dead:
        return ask.wrong(
            f"the gradient of {listed(dead)} is exactly zero in {len(trial.taken)} steps: look for dead "
            "units, a loss that ignores them, or weights that are all zero",
            dead[0],
        )
    unrated = [name for name in still if holders.rates.get(name) == 0.0]
    if unrated and all((holders.initial_rates.get(name) or 0.0) > 0.0 for name in unrated):
        return ask.unknown(
            f"the learning rate of {listed(unrated)} is 0 as its schedule begins, so nothing moves yet"
        )
    if unrated:
        return ask.wrong(
            f"{listed(unrated)} {_verb(unrated, 'does', 'do')} not move: the learning rate is 0",
            unrated[0],
        )
    return ask.wrong(
        f"{listed(still)} {_verb(still, 'gets', 'get')} a gradient and {_verb(still, 'does', 'do')} not move: "
        "the update is lost to rounding, or the optimizer drops it",
        still[0],
    )


def _is_faint(trial: Trial, name: str) -> bool:
    """Whether so little gradient arrives that standing still is no fault of the optimizer.

    A bias before a normalisation gets rounding errors; that of the last layer exact zeros where the signs
    of an L1 loss cancel.
    """
    own, whole = trial.gradient_of(name), trial.gradient_of(None)
    if own > 0.0:
        return own <= ROUNDING * whole
    module, _, kind = name.rpartition(".")
    weight = f"{module}.weight" if module else "weight"
    return kind == "bias" and PathState.LIVE in trial.states(weight)


def finite_check(trial: Trial) -> Check:
    """Say whether weights and gradients are finite before and after the step."""
    ask = _Question("finite")
    if trial.nonfinite_before:
        names = listed(trial.nonfinite_before)
        return ask.wrong(f"{names} holds NaN or Inf before any step", trial.nonfinite_before[0])
    if not trial.records:
        return ask.unknown("no step was taken")
    bad = next((record for record in trial.taken if record.nonfinite_tensors), None)
    if not trial.taken:
        bad = trial.records[-1]
    if bad is not None:
        name = bad.first_nonfinite
        return ask.wrong(
            f"the gradient of {name or 'some parameters'} is not finite{_because(trial.origin)}",
            name,
        )
    if trial.nonfinite_after:
        names = listed(trial.nonfinite_after)
        return ask.wrong(f"the step writes NaN or Inf into {names}", trial.nonfinite_after[0])
    return ask.right("weights, buffers and gradients stay finite")


def gradient_check(trial: Trial, *, wanted: bool) -> Check:
    """Say whether the gradient is what finite differences say."""
    ask = _Question("gradient")
    if not wanted:
        return ask.unknown("switched off with gradient=False")
    if trial.gradient_error is not None:
        return ask.unknown(f"computing the loss again failed with {trial.gradient_error}")
    found = trial.agreement
    if found is None:
        why = (
            "no step was taken"
            if trial.error
            else "step_fn must return the loss and not step itself"
        )
        return ask.unknown(why)
    if found.reason is not None:
        return ask.unknown(found.reason)
    if found.right:
        return ask.right(
            f"it agrees with finite differences of the loss within {found.disagreement or 0.0:.1%}"
        )
    of = f" of {listed(found.parameters)}" if found.parameters else ""
    ratio = found.ratio if found.ratio is not None else math.nan
    size = (
        "the loss does not change along it"
        if math.isinf(ratio)
        else f"it is {ratio:.3g} times the finite difference of the loss"
    )
    return ask.wrong(
        f"the gradient{of} is not the loss's own, {size}: check hand-written backwards with "
        "torch.autograd.gradcheck, or pass gradient=False if it is meant so",
        found.parameters[0] if found.parameters else None,
    )


def truth_check(trial: Trial, plan: Plan | None, *, wanted: bool) -> Check:
    """Say whether the loss is near its floor where the answer is right."""
    ask = _Question("truth")
    if not wanted:
        return ask.unknown("pass truth=, a callable that returns the loss of the right answer")
    if trial.truth_error is not None:
        return ask.wrong(f"truth failed with {trial.truth_error}")
    value = trial.truth
    if value is None:
        return ask.unknown("it was not computed")
    if not math.isfinite(value):
        return ask.wrong(f"the loss at the truth is {value}")
    loss = next(filter(math.isfinite, trial.losses), None)
    if loss is None:
        return ask.unknown(
            f"it is {value:.4g} at the truth, with no loss of the model to compare it with"
        )
    floor = 0.0 if plan is None or plan.floor is None else plan.floor
    both = f"{value:.4g} at the truth, and {loss:.4g} for the model as it is"
    if abs(value - floor) <= TRUTH_SHARE * abs(loss - floor):
        return ask.right(f"the loss is {both}")
    return ask.wrong(
        f"the loss is {both}: it should all but vanish at the truth; look for other units, order, scaling "
        "or a wrong target (or declare its smallest value in plan=gg.Plan(floor=...))"
    )


def rules_check(trial: Trial) -> Check:
    """Say what the rules found in the steps that were taken."""
    ask = _Question("rules")
    if trial.diagnosis is None:
        return ask.unknown("no step was taken")
    causes = [cause.finding for cause in trial.diagnosis.causes]
    errors = [one for one in causes if one.severity is Severity.ERROR]
    said = "; ".join(f"{one.code} {one.message}" for one in (errors or causes)[:_SHOWN])
    if errors:
        return ask.wrong(said, errors[0].place)
    if causes:
        return ask.right(f"no error, but: {said}")
    return ask.right(f"none of {len(trial.diagnosis.looked_at)} rules has anything to say")


def listed(names: Sequence[str]) -> str:
    """Return a few of the names and how many more there are."""
    shown = ", ".join(names[:_SHOWN])
    rest = len(names) - _SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def unasked(name: str, why: str) -> Check:
    """Return a question that was not asked."""
    return _Question(name).unknown(why)


class _Question:
    """Gives the answers to one question its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def right(self, message: str) -> Check:
        return Check(name=self._name, passed=True, message=message)

    def unknown(self, message: str) -> Check:
        return Check(name=self._name, passed=None, message=message)

    def wrong(self, message: str, place: str | None = None) -> Check:
        return Check(name=self._name, passed=False, message=message, place=place)


def _because(origin: str | None) -> str:
    return "" if origin is None else f": {origin.rstrip('.')}"


def _verb(names: Sequence[object], one: str, many: str) -> str:
    return one if len(names) == 1 else many


def _tensors(count: int) -> str:
    return f"{count} {'tensor' if count == 1 else 'tensors'}"


def _be(count: int) -> str:
    return "is" if count == 1 else "are"

"""Builders of small runs for the rules' examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gradguard.facts import (
    Fact,
    GroupFacts,
    ParameterFacts,
    Plan,
    Setup,
)
from gradguard.records import (
    Drift,
    ParameterReading,
    PathState,
    StepOutcome,
    StepRecord,
    WindowReading,
)
from gradguard.runlog import RunLog

NAMES = ("first.weight", "first.bias", "last.weight", "last.bias")


def step(number: int, **changes: Any) -> StepRecord:
    """Return the record of a healthy step, with changes; ``window=`` may be a mapping of changes.

    The loss falls by 2 % a step from 1.0, the gradient norm is 0.5, the update 1 % of the weight.
    """
    window = changes.pop("window", {})
    healthy: dict[str, Any] = {
        "optimizer": "optimizer",
        "outcome": StepOutcome.APPLIED,
        "micro_steps": 1,
        "loss": 0.98**number,
        "gradient_norm": 0.5,
        "nonfinite_tensors": 0,
        "nan_count": 0,
        "inf_count": 0,
        "drift": drift(),
        "groups": (drift("group 0"),),
        "learning_rates": (1e-3,),
        "window": window
        if isinstance(window, WindowReading) or window is None
        else windowed(**window),
    }
    return StepRecord(step=number, **(healthy | changes))


def windowed(**changes: Any) -> WindowReading:
    """Return what happens between two healthy steps, with changes."""
    healthy: dict[str, Any] = {
        "forwards": 1,
        "forwards_reached": 1,
        "forwards_in_eval": 0,
        "samples": 32,
        "samples_reached": 32,
        "stale_backwards": 0,
        "fresh_micro_steps": 1,
        "carried_norm": 0.0,
        "backward_norm": 0.1,
        "step_norm": 0.1,
        "backward_nonfinite": False,
        "without_gradient": 0,
        "never_gradient": (),
    }
    return WindowReading(**(healthy | changes))


def drift(
    name: str = "all", *, update: float = 0.1, weight: float = 10.0, moved: float = 1.0
) -> Drift:
    """Return an exact reading of movement."""
    return Drift(
        name=name,
        update_norm=update,
        weight_norm=weight,
        moved_fraction=moved,
        sampled=100,
        total=100,
        relative_error=0.0,
    )


def reading(name: str, *, path: PathState = PathState.LIVE, **changes: Any) -> ParameterReading:
    """Return one parameter on a detailed step: live, with a gradient norm of 0.1, unless changed."""
    norms = {PathState.LIVE: 0.1, PathState.ZERO: 0.0, PathState.NONFINITE: float("nan")}
    healthy: dict[str, Any] = {"gradient_norm": norms.get(path), "drift": drift(name)}
    return ParameterReading(name=name, path=path, **(healthy | changes))


def readings(changes: Mapping[str, ParameterReading] | None = None) -> tuple[ParameterReading, ...]:
    """Return readings of the four parameters of :func:`setup`, all live unless given."""
    given = changes or {}
    return tuple(given.get(name) or reading(name) for name in NAMES)


def parameter(name: str, **changes: Any) -> ParameterFacts:
    """Return one float32 parameter of 8 x 8 (weights) or 8 values in group 0, with changes."""
    matrix = name.endswith("weight")
    healthy: dict[str, Any] = {
        "shape": (8, 8) if matrix else (8,),
        "dtype": "float32",
        "trainable": True,
        "optimizer": "optimizer",
        "group": 0,
        "module": name.rpartition(".")[0],
        "module_kind": "Linear",
        "rms": 0.2,
        "max_abs": 0.35,
        "zero_fraction": 0.0,
        "distinct_rows": 1.0 if matrix else None,
        "nonfinite": False,
    }
    return ParameterFacts(name=name, **(healthy | changes))


def group(**settings: float) -> GroupFacts:
    """Return an AdamW group with the settings of torch, with changes."""
    healthy = {"lr": 1e-3, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    return GroupFacts(
        optimizer="optimizer", index=0, kind="AdamW", parameters=4, settings=healthy | settings
    )


def setup(
    *,
    step: int = 0,
    parameters: Iterable[ParameterFacts] | None = None,
    groups: Iterable[GroupFacts] | None = None,
    plan: Plan | None = None,
    **changes: Any,
) -> Setup:
    """Return a model of two linear layers under AdamW, with changes."""
    own = tuple(parameter(name) for name in NAMES) if parameters is None else tuple(parameters)
    return Setup(
        step=step,
        model="Sequential",
        parameters=own,
        groups=(group(),) if groups is None else tuple(groups),
        plan=plan,
        **changes,
    )


def run(records: Iterable[StepRecord], *facts: Fact) -> RunLog:
    """Return a log of these records and facts."""
    return RunLog(records, facts=facts)


def healthy(steps: int = 8, *facts: Fact, **changes: Any) -> RunLog:
    """Return a run of healthy steps, each with the same changes; the first three are detailed."""
    records = [
        step(i, **({"parameters": readings() if i < 3 else None} | changes)) for i in range(steps)
    ]
    return run(records, setup(), *facts)

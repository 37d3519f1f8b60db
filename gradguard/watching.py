"""``watch``: checks what it is given and attaches a guard to a training loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.amp import GradScaler

from gradguard.arming import Arming
from gradguard.engine import asks_for_probes, diagnose
from gradguard.facts import Plan
from gradguard.gate import StepGate
from gradguard.guard import Guard
from gradguard.rundir import RunDirectory
from gradguard.scaler import check_scaler, innermost_optimizer
from gradguard.sensors.sensors import Sensors
from gradguard.stepwatch import OptimizerWatch, WatchSettings
from gradguard.surroundings import Surroundings


def watch(
    model: nn.Module,
    optimizer: object,
    *,
    scaler: GradScaler | Mapping[str, GradScaler | None] | None = None,
    gate: StepGate | Mapping[str, StepGate] | None = None,
    averaged: nn.Module | Mapping[str, Tensor] | None = None,
    run: str | Path | RunDirectory | None = None,
    drift: str = "sampled",
    detail_every: int = 50,
    lag: int = 8,
    wrap_update: bool = True,
    plan: Plan | None = None,
    explain: bool = True,
    strict: bool = False,
) -> Guard:
    """Watch every optimizer step of a training loop; leave the block or call ``detach()`` to stop.

    ::

        with gg.watch(model, optimizer, scaler=scaler) as guard:
            ...  # the training loop, unchanged

    Args:
        model: gives the parameters their names; it is not kept.
        optimizer: the optimizer, or a mapping from name to optimizer.
        scaler: the ``GradScaler`` whose ``step`` and ``update`` the loop calls, or a mapping from
            optimizer name to scaler where they differ or some have none.
        gate: the ``StepGate`` of the optimizer, or a mapping from optimizer name to gate.
        averaged: averaged copy of the model (EMA, SWA) whose lag is read on detailed steps: a module
            or a mapping from parameter name to tensor.
        run: a new directory to record to, or an open ``RunDirectory``; the guard closes it.
        drift: ``"sampled"``, ``"exact"`` (one transient copy of the weights) or ``"off"``.
        detail_every: steps between steps that are measured per parameter.
        lag: how many steps late records may arrive; a killed process loses at most these.
        wrap_update: False to leave ``GradScaler.update`` alone and call ``before_update`` and
            ``after_update`` around it yourself.
        plan: what you intend, such as the number of steps; rules compare it with what happens.
        explain: listen to one step (two at most in a run, a few times slower) when a rule finds a gradient that
            is missing, zero or not finite, so that it can name the operation and the source line.
        strict: raise faults of the guard instead of recording them (for tests).

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: nothing to train, or a number out of range.

    Sync: none per step. Memory: about 25 bytes for one value in 256, within 64 and
    1,024 values per tensor.
    """
    optimizers = _named_optimizers(optimizer)
    _check_numbers(drift=drift, detail_every=detail_every, lag=lag)
    names = _parameter_names(model)
    gates = gate if isinstance(gate, Mapping) else dict.fromkeys(optimizers, gate)
    scalers = _scalers_by_name(scaler, optimizers)
    guard = Guard(lag=lag, strict=strict, judge=diagnose)
    if run is not None:
        directory = run if isinstance(run, RunDirectory) else RunDirectory.create(run)
        guard.record_to(directory)
    for name, one in optimizers.items():
        guard.add_watch(
            OptimizerWatch(
                name,
                one,
                parameter_names=names,
                settings=WatchSettings(detail_every=detail_every, drift=drift),
                scaler=scalers[name],
                gate=gates.get(name),
                averaged=_averaged_by_name(averaged),
                protect=guard.protect,
                emit=guard.emit,
            )
        )
    if wrap_update:
        _follow(guard, scalers)
    guard.look_around(_surroundings(model, optimizers, scalers, plan))
    inner = {name: innermost_optimizer(one) for name, one in optimizers.items()}
    clock = guard.clock(detail_every=detail_every)
    arming = Arming(model, asks=asks_for_probes, add=guard.add_fact) if explain else None
    guard.use_sensors(
        Sensors(
            model,
            inner,
            clock=clock,
            add=guard.add_fact,
            protect=guard.protect,
            lag=4 * lag,
            arming=arming,
        )
    )
    if averaged is not None:
        guard.follow_copy("averaged", averaged)
    return guard


def _surroundings(
    model: nn.Module,
    optimizers: Mapping[str, object],
    scalers: Mapping[str, GradScaler | None],
    plan: Plan | None,
) -> Surroundings:
    inner = {name: innermost_optimizer(one) for name, one in optimizers.items()}
    scaled = any(one is not None and one.is_enabled() for one in scalers.values())
    return Surroundings(model, inner, scaler=scaled, plan=plan)


def _scalers_by_name(
    scaler: GradScaler | Mapping[str, GradScaler | None] | None, optimizers: Mapping[str, object]
) -> dict[str, GradScaler | None]:
    if not isinstance(scaler, Mapping):
        return dict.fromkeys(optimizers, None if scaler is None else check_scaler(scaler))
    unknown = sorted(set(scaler) - set(optimizers))
    if unknown:
        raise ValueError(
            f"watch(): scalers are given for {unknown}, but the optimizers are {sorted(optimizers)}"
        )
    given = {name: scaler.get(name) for name in optimizers}
    return {name: None if one is None else check_scaler(one) for name, one in given.items()}


def _follow(guard: Guard, scalers: Mapping[str, GradScaler | None]) -> None:
    """Watch the updates of every enabled scaler once, for all optimizers on it."""
    enabled = {name: one for name, one in scalers.items() if one is not None and one.is_enabled()}
    for scaler in {id(one): one for one in enabled.values()}.values():
        guard.follow_updates(scaler, [name for name, one in enabled.items() if one is scaler])


def _named_optimizers(optimizer: object) -> dict[str, object]:
    named = dict(optimizer) if isinstance(optimizer, Mapping) else {"optimizer": optimizer}
    if not named:
        raise ValueError("watch() got an empty mapping of optimizers; pass at least one")
    for one in named.values():
        innermost_optimizer(one)
    return named


def _check_numbers(*, drift: str, detail_every: int, lag: int) -> None:
    if drift not in ("sampled", "exact", "off"):
        raise ValueError(f"watch(drift={drift!r}): expected 'sampled', 'exact' or 'off'")
    for name, value in (("detail_every", detail_every), ("lag", lag)):
        if value < 1:
            raise ValueError(f"watch({name}={value}): expected a number of steps, at least 1")


def _parameter_names(model: nn.Module) -> dict[int, str]:
    """Return names by id, after checking that there is something to train."""
    names = {id(p): name for name, p in model.named_parameters()}
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"watch(): the model {type(model).__name__} has no trainable parameter "
            f"({len(names)} parameters, none with requires_grad=True); there is nothing to watch"
        )
    return names


def _averaged_by_name(averaged: nn.Module | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if averaged is None:
        return {}
    if isinstance(averaged, Mapping):
        return dict(averaged)
    # torch's AveragedModel keeps the copy under "module."
    return {n.removeprefix("module."): p.detach() for n, p in averaged.named_parameters()}

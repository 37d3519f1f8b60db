"""Puts together what a training step needs, and takes a first look at it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW

import gradguard as gg
from reference_trainer.averaging import AveragedWeights
from reference_trainer.errors import ConfigError
from reference_trainer.model import CovarianceNetwork, parameter_groups
from reference_trainer.objective import Objective
from reference_trainer.processes import ALONE, Processes
from reference_trainer.results import RunStart
from reference_trainer.schedule import planned_steps, warmup_cosine
from reference_trainer.threads import ThreadChoice, choose_threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import nn
    from torch.optim.lr_scheduler import LambdaLR

    from reference_trainer.config import Config, Device, OptimizationConfig, Precision
    from reference_trainer.data import DataSets
    from reference_trainer.examples import Examples

_AUTOCAST: Mapping[Precision, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that one training step touches.

    Attributes:
        model: the live weights.
        network: what a step calls: ``model``, or that of all processes together.
        optimizer: AdamW with one group for the backbone and one for the heads.
        scaler: torch's gradient scaler; disabled unless the precision is fp16.
        schedule: learning rates; stepped after each step that was taken.
        averaged: what is evaluated and saved.
        objective: the loss of training and of evaluation.
        clip_norm: largest global gradient norm; 0 clips nothing.
        device: where all this is.
        processes: those that take each step together.
    """

    model: CovarianceNetwork
    network: nn.Module
    optimizer: AdamW
    scaler: GradScaler
    schedule: LambdaLR
    averaged: AveragedWeights[CovarianceNetwork]
    objective: Objective
    clip_norm: float
    device: torch.device
    processes: Processes = ALONE


def pick_device(wanted: Device) -> torch.device:
    """Return the device to run on.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("setting runtime.device: got 'cuda', but torch sees no CUDA device here")
    use_cuda = wanted != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def steps_of(config: Config) -> int:
    """Return the optimizer steps of a run of ``config`` in which none is skipped."""
    return planned_steps(
        scenes=config.scenes.train,
        batch_scenes=config.optimization.batch_scenes,
        accumulation=config.optimization.accumulation,
        epochs=config.optimization.epochs,
    )


def assemble(config: Config, device: torch.device, processes: Processes = ALONE) -> Parts:
    """Build the parts of a run.

    Seeds torch's global generator with ``network.seed``: the weights are the same on all processes,
    and what is drawn after them (dropout) is different on each.
    """
    torch.manual_seed(config.network.seed)
    model = new_network(config).to(device)
    if not processes.leads:
        torch.manual_seed(config.network.seed + (processes.rank << 32))
    optimizer = _optimizer(model, config.optimization)
    return Parts(
        model=model,
        network=model,
        optimizer=optimizer,
        scaler=GradScaler(
            device.type,
            enabled=config.precision.mode == "fp16",
            init_scale=config.precision.initial_loss_scale,
            backoff_factor=config.precision.backoff_factor,
            growth_interval=config.precision.growth_interval,
        ),
        schedule=warmup_cosine(
            optimizer,
            planned=steps_of(config),
            warmup_fraction=config.optimization.warmup_fraction,
            final_fraction=config.optimization.final_fraction,
        ),
        averaged=AveragedWeights(
            model, decay=config.optimization.averaging_decay, mean_from=_mean_from(config)
        ),
        objective=Objective(
            weights=config.loss,
            sample_blend=config.optimization.sample_blend,
            autocast=_AUTOCAST[config.precision.mode],
        ),
        clip_norm=config.optimization.clip_norm,
        device=device,
        processes=processes,
    )


def new_network(config: Config) -> CovarianceNetwork:
    """Return the network of a run before its first step. Draws from torch's global generator."""
    return CovarianceNetwork(
        dropout=config.network.dropout, grid_temperature=config.schedules.temperature_start
    )


def _mean_from(config: Config) -> int | None:
    """Steps after which the averaged weights are a plain mean."""
    fraction = config.optimization.swa_fraction
    return round((1.0 - fraction) * steps_of(config)) if fraction else None


def connected(parts: Parts, start: RunStart) -> Parts:
    """Return the parts with gradients averaged over processes; the same parts for one process."""
    network = parts.processes.replicate(parts.model, some_unused=bool(start.dead))
    return replace(parts, network=network)


def _optimizer(model: CovarianceNetwork, config: OptimizationConfig) -> AdamW:
    groups = parameter_groups(model)
    rates = {"backbone": config.backbone_learning_rate, "head": config.head_learning_rate}
    return AdamW(
        [{"params": groups[name], "lr": rate} for name, rate in rates.items()],
        weight_decay=config.weight_decay,
        fused=True,
    )


def look_first(
    parts: Parts,
    data: DataSets,
    config: Config,
    directory: Path | None,
    *,
    threads: int | None = None,
) -> RunStart:
    """Rehearse forward and backward passes: which tensors are live, how many threads are best.

    Args:
        parts: of the run.
        data: a batch of it is rehearsed on.
        config: the whole run.
        directory: the run directory.
        threads: torch's threads where they are known already; else as configured.
    """
    batch = data.memorised.select(slice(0, config.optimization.batch_scenes))
    with _without_traces(batch):
        readings = first_readings(parts, batch)
        choice = _threads(parts, batch, threads or config.runtime.threads)
    torch.set_num_threads(parts.processes.agree(choice.threads))
    parameters = list(parts.model.parameters())
    dead = tuple(reading.name for reading in readings if reading.state is not gg.PathState.LIVE)
    return RunStart(
        tensors=len(parameters),
        parameters=sum(parameter.numel() for parameter in parameters),
        live=len(readings) - len(dead),
        dead=dead,
        device=str(parameters[0].device),
        precision=config.precision.mode,
        threads=torch.get_num_threads(),
        thread_seconds=choice.seconds,
        memorised_scenes=len(data.training),
        held_out_scenes=len(data.held_out),
        planned_steps=steps_of(config),
        directory=directory,
        processes=parts.processes.count,
        source=config.scenes.source,
    )


def first_readings(parts: Parts, examples: Examples) -> tuple[gg.PathReading, ...]:
    """Say what one backward pass leaves in the gradient of every parameter, then clear them.

    In single precision: which tensors the loss reaches is a matter of wiring, not of rounding.

    Sync: one copy to the host.
    """
    loss = replace(parts.objective, autocast=None)(parts.model, examples).loss
    torch.autograd.backward(loss)
    readings = gg.gradient_readings(parts.model)
    parts.optimizer.zero_grad()
    return readings


def _threads(parts: Parts, examples: Examples, wanted: int) -> ThreadChoice:
    """Take what was asked for; for 0, time forward and backward passes of the real network."""

    def work() -> None:
        torch.autograd.backward(parts.objective(parts.model, examples).loss)
        parts.optimizer.zero_grad()

    on_cpu = examples.stencil.device.type == "cpu"
    measured = (1, torch.get_num_threads()) if on_cpu else (torch.get_num_threads(),)
    return choose_threads(work, candidates=(wanted,) if wanted else measured)


def _without_traces(examples: Examples) -> AbstractContextManager[None]:
    """Keep dropout in a rehearsal from moving the random state of the run."""
    device = examples.stencil.device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def attach_gate(parts: Parts, config: Config) -> Iterator[gg.StepGate | None]:
    """Put a step gate before the optimizer, if the configuration wants one, until the block ends."""
    if not config.guard.gate:
        yield None
        return
    with gg.StepGate(parts.optimizer) as gate:
        yield gate


def attach_guard(
    parts: Parts,
    config: Config,
    recorder: gg.RunDirectory | None,
    *,
    gate: gg.StepGate | None = None,
) -> gg.Guard:
    """Watch the run, and its gate, until the guard is left or detached."""
    return gg.watch(
        parts.model,
        parts.optimizer,
        scaler=parts.scaler,
        gate=gate,
        averaged=parts.averaged.module,
        run=recorder,
        lag=config.guard.lag,
        detail_every=config.guard.detail_every,
    )

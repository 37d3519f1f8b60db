"""Training, read from top to bottom: a run, an epoch, a step."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import gradguard as gg
from reference_trainer.data import batches, draw_data, windows
from reference_trainer.evaluation import evaluate
from reference_trainer.recording import record_epoch
from reference_trainer.reporting import SilentView
from reference_trainer.results import EpochResult, TrainingResult
from reference_trainer.settings import as_mapping
from reference_trainer.setup import assemble, attach_guard, look_first, pick_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from reference_trainer.config import Config
    from reference_trainer.data import DataSets
    from reference_trainer.evaluation import Evaluation
    from reference_trainer.examples import Examples
    from reference_trainer.reporting import TrainingView
    from reference_trainer.setup import Parts


def train(
    config: Config, *, run_directory: Path | None = None, view: TrainingView | None = None
) -> TrainingResult:
    """Train a network from scratch under the guard.

    Sets torch's global seed and its number of threads.

    Args:
        config: the whole run.
        run_directory: a new or empty directory for records, evaluations and checkpoints.
        view: is told what happens while it happens.

    Raises:
        TrainerError: what a person can mend: the device, the data, the disk.
        gradguard.RunDirectoryError: the run directory is in use or cannot be written.
        gradguard.GateCeilingError: the gate vetoed too many steps.
    """
    began_s, view = time.perf_counter(), view or SilentView()
    device = pick_device(config.runtime.device)
    with ExitStack() as stack:
        recorder = None
        if run_directory is not None:
            recorder = gg.RunDirectory.create(run_directory, config=as_mapping(config))
            stack.enter_context(recorder)
        view.preparing(config)
        data = draw_data(config.scenes, device=device)
        parts = assemble(config, device)
        start = look_first(parts, data, config, run_directory)
        view.started(start)
        guard = stack.enter_context(attach_guard(parts, config, recorder))
        guard.subscribe(view.step_ended)
        epochs = []
        for result in train_epochs(parts, data, config, guard):
            epochs.append(result)
            if run_directory is not None:
                record_epoch(run_directory, config, parts.averaged.module, result)
            view.epoch_ended(result)
        live = evaluate_on(parts.model, data.memorised, parts, config)
    return TrainingResult(
        start=start,
        epochs=tuple(epochs),
        live=live,
        log=guard.log,
        model=parts.averaged.module,
        wall_s=time.perf_counter() - began_s,
    )


def train_epochs(
    parts: Parts, data: DataSets, config: Config, guard: gg.Guard
) -> Iterator[EpochResult]:
    """Yield every epoch once it is over, evaluated where it is due; number 0 is before training."""
    told = 0
    for epoch in range(config.optimization.epochs + 1):
        loss = train_epoch(parts, data.memorised, config, guard, epoch) if epoch else None
        guard.flush()
        averaged, due = parts.averaged.module, is_evaluated(epoch, config)
        new_findings = guard.findings[told:]
        told += len(new_findings)
        yield EpochResult(
            epoch=epoch,
            epochs=config.optimization.epochs,
            steps_taken=parts.averaged.taken,
            training_loss=loss,
            memorised=evaluate_on(averaged, data.memorised, parts, config) if due else None,
            held_out=evaluate_on(averaged, data.held_out, parts, config) if due else None,
            findings=new_findings,
        )


def train_epoch(
    parts: Parts, examples: Examples, config: Config, guard: gg.Guard, epoch: int
) -> float:
    """Take a step on every window of the epoch; return the mean loss over its scenes.

    Sync: one copy to the host at the end, besides what the steps wait for.
    """
    parts.model.train()
    drawn = batches(
        len(examples),
        batch_scenes=config.optimization.batch_scenes,
        seed=config.network.seed,
        epoch=epoch,
    )
    total = torch.zeros((), dtype=torch.float64, device=examples.stencil.device)
    for window in windows(guard.batches(drawn), config.optimization.accumulation):
        loss = training_step(parts, examples, window, guard)
        total += loss * sum(len(index) for index in window)
    return total.item() / len(examples)


def training_step(
    parts: Parts, examples: Examples, window: Sequence[Tensor], guard: gg.Guard
) -> Tensor:
    """Take one optimizer step on the mean loss over the scenes of ``window``; return that loss.

    Args:
        parts: model, optimizer and the rest.
        examples: the training set.
        window: index tensors of the micro-batches whose gradients are accumulated.
        guard: is told the loss and its terms.

    Sync: with a gradient scaler or a gate, one flag is read to learn whether the step was taken.
    """
    scenes = sum(len(index) for index in window)
    mean = torch.zeros((), device=examples.stencil.device)
    for index in window:
        value = parts.objective(parts.model, examples.select(index.to(mean.device)))
        weight = len(index) * len(window) / scenes  # 1, unless the last micro-batch is short
        loss = weight * value.loss
        parts.scaler.scale(loss / len(window)).backward()  # type: ignore[no-untyped-call]
        terms = {name: weight * term for name, term in value.terms.as_dict().items()}
        guard.observe(loss=loss, terms=terms)
        mean += loss.detach() / len(window)
    parts.scaler.unscale_(parts.optimizer)
    norm = clip_gradients(parts.model.parameters(), parts.clip_norm)
    guard.observe(reported_loss=mean, gradient_norm=norm)
    parts.scaler.step(parts.optimizer)
    parts.scaler.update()
    parts.optimizer.zero_grad()
    if guard.step_was_taken():  # a skipped or vetoed step moves neither schedule nor average
        parts.schedule.step()
        parts.averaged.update()
    return mean


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a global norm of ``max_norm``; return the norm before, 0-dim.

    Where the norm is not finite nothing is scaled: torch's ``clip_grad_norm_`` would spread a
    single NaN over every gradient and hide where it came from.

    Args:
        parameters: the parameters whose gradients are one vector.
        max_norm: largest norm; 0 clips nothing.

    Sync: none.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([p.grad for p in trained if p.grad is not None])
    if max_norm > 0.0:
        clip_grads_with_norm_(trained, max_norm, torch.where(norm.isfinite(), norm, 0.0))
    return norm


def is_evaluated(epoch: int, config: Config) -> bool:
    """Whether both sets are evaluated after ``epoch``: what is saved always is."""
    last = config.optimization.epochs
    every = (config.runtime.evaluate_every, config.runtime.checkpoint_every)
    return epoch == last or any(epoch % interval == 0 for interval in every)


def evaluate_on(model: nn.Module, examples: Examples, parts: Parts, config: Config) -> Evaluation:
    """Evaluate with the objective and the batches of training."""
    batch_scenes = config.optimization.batch_scenes
    return evaluate(model, examples, parts.objective, batch_scenes=batch_scenes)

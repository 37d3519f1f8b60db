"""Training, read from top to bottom: a run, an epoch, a step."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch

from reference_trainer.annealing import at_epoch, best_epoch, stops_early
from reference_trainer.data import batches, first_number, windows
from reference_trainer.evaluation import Evaluation, evaluate
from reference_trainer.processes import ALONE, Processes, keeping_gradients
from reference_trainer.reporting import SilentView
from reference_trainer.restore import SavedRun, find_run
from reference_trainer.results import EpochResult, TrainingResult
from reference_trainer.session import Session, opened
from reference_trainer.training_state import Position

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    import gradguard as gg
    from reference_trainer.config import Config
    from reference_trainer.data import TrainingScenes
    from reference_trainer.examples import Examples
    from reference_trainer.recording import StateKeeper
    from reference_trainer.reporting import TrainingView
    from reference_trainer.setup import Parts


def train(
    config: Config,
    *,
    run_directory: Path | None = None,
    view: TrainingView | None = None,
    processes: Processes = ALONE,
) -> TrainingResult:
    """Train a network from scratch under the guard.

    Sets torch's global seed and its number of threads.

    Args:
        config: the whole run.
        run_directory: a new or empty directory for records, evaluations, checkpoints and states.
        view: is told what happens while it happens.
        processes: those that train together, each in this call; ``batch_scenes`` is what they see
            together.

    Raises:
        TrainerError: what a person can mend: the device, the data, the disk.
        gradguard.RunDirectoryError: the run directory is in use or cannot be written.
        gradguard.GateCeilingError: the gate vetoed too many steps.
    """
    return _finish(config, run_directory, None, view or SilentView(), processes)


def resume(
    run_directory: Path, *, view: TrainingView | None = None, processes: Processes = ALONE
) -> TrainingResult:
    """Go on with a run that was killed, from its last state: it ends in the bits it would have had.

    A run that was killed before its first state begins again; one that is finished is only judged.

    Args:
        run_directory: of the run.
        view: is told what happens while it happens.
        processes: as many as before.

    Raises:
        TrainerError: what a person can mend: no readable state, another number of processes.
        gradguard.RunDirectoryError: there is no run in the directory, or it cannot be written.
        gradguard.GateCeilingError: the gate vetoed too many steps.
    """
    saved = find_run(run_directory)
    return _finish(saved.config, run_directory, saved, view or SilentView(), processes)


def _finish(
    config: Config,
    directory: Path | None,
    saved: SavedRun | None,
    view: TrainingView,
    processes: Processes,
) -> TrainingResult:
    began_s = time.perf_counter()
    with opened(
        config, directory=directory, saved=saved, view=view, processes=processes
    ) as session:
        view.started(session.start)
        session.guard.subscribe(view.step_ended)
        epochs = list(session.epochs)
        for result in train_epochs(session):
            epochs.append(result)
            view.epoch_ended(result)
        live = evaluate_on(session.parts.model, session.data.memorised, session.parts, config)
    return TrainingResult(
        start=session.start,
        epochs=tuple(epochs),
        live=live,
        log=session.guard.log,
        model=session.parts.averaged.module,
        wall_s=time.perf_counter() - began_s,
    )


def train_epochs(session: Session) -> Iterator[EpochResult]:
    """Yield every epoch that is left once it is over, evaluated where it is due, and recorded.

    Number 0 is before training.
    """
    parts, data, config, guard = session.parts, session.data, session.config, session.guard
    begin, epochs, told = session.position, list(session.epochs), 0
    if begin is not None and begin.finished:
        return
    for epoch in range(0 if begin is None else begin.epoch + 1, config.optimization.epochs + 1):
        loss = train_epoch(parts, data.training, config, guard, epoch, begin, session.keeper)
        guard.flush()
        averaged, due, begin = parts.averaged.module, is_evaluated(epoch, config), None
        new_findings = guard.findings[told:]
        told += len(new_findings)
        result = EpochResult(
            epoch=epoch,
            epochs=config.optimization.epochs,
            steps_taken=parts.averaged.taken,
            training_loss=loss,
            memorised=evaluate_on(averaged, data.memorised, parts, config) if due else None,
            held_out=evaluate_on(averaged, data.held_out, parts, config) if due else None,
            findings=new_findings,
        )
        result = replace(result, last=is_last([*epochs, result], config))
        epochs.append(result)
        session.record(result, best=best_epoch(epochs) is result)
        yield result
        if result.last:
            return


def is_last(epochs: Sequence[EpochResult], config: Config) -> bool:
    """Whether training ends with the newest of ``epochs``."""
    planned = epochs[-1].epoch == config.optimization.epochs
    return planned or stops_early(epochs, patience=config.optimization.patience)


def train_epoch(
    parts: Parts,
    examples: TrainingScenes,
    config: Config,
    guard: gg.Guard,
    epoch: int,
    begin: Position | None = None,
    keeper: StateKeeper | None = None,
) -> float | None:
    """Take a step on every window of the epoch; return the mean loss over its scenes.

    Args:
        parts: model, optimizer and the rest.
        examples: the training set.
        config: the whole run.
        guard: is told every batch.
        epoch: from 1; in number 0 nothing is trained, and None returned.
        begin: windows of this epoch that are done already.
        keeper: saves the training state where it is due.

    Sync: one copy to the host at the end, besides what the steps wait for.
    """
    if epoch == 0:
        return None
    parts = at_epoch(parts, config, epoch)
    parts.model.train()
    done, accumulation = begin or Position(), config.optimization.accumulation
    drawn = batches(
        len(examples),
        batch_scenes=config.optimization.batch_scenes,
        seed=config.network.seed,
        epoch=epoch,
        first=first_number(examples, epoch),
    )
    left = islice(drawn, done.windows * accumulation, None)
    total = torch.tensor(done.loss_sum, dtype=torch.float64, device=parts.device)
    for number, window in enumerate(windows(guard.batches(left), accumulation), done.windows + 1):
        loss = training_step(parts, examples, window, guard)
        total += loss * sum(len(index) for index in window)
        if keeper is not None and keeper.step_ended():
            keeper.save(Position(epoch=epoch - 1, windows=number, loss_sum=total.item()))
    return total.item() / len(examples)


def training_step(
    parts: Parts, examples: TrainingScenes, window: Sequence[Tensor], guard: gg.Guard
) -> Tensor:
    """Take one optimizer step on the mean loss over the scenes of ``window``; return that loss.

    Args:
        parts: model, optimizer and the rest.
        examples: the training set.
        window: index tensors of the micro-batches whose gradients are accumulated; every process
            takes its share of each.
        guard: is told the loss and its terms on this process.

    Sync: with a gradient scaler or a gate, one flag is read to learn whether the step was taken.
    """
    scenes = sum(len(index) for index in window)
    mean = torch.zeros((), device=parts.device)
    for number, index in enumerate(window, start=1):
        own, count = parts.processes.share(index)
        with keeping_gradients(parts.network, last=number == len(window)):
            value = parts.objective(parts.network, examples.select(own))
            weight = count * len(window) / scenes  # 1, unless a micro-batch or a share is short
            loss = weight * value.loss
            parts.scaler.scale(loss / len(window)).backward()  # type: ignore[no-untyped-call]
        terms = {name: weight * term for name, term in value.terms.as_dict().items()}
        guard.observe(loss=loss, terms=terms)
        mean += loss.detach() / len(window)
    parts.scaler.unscale_(parts.optimizer)
    # Where the norm is not finite nothing is scaled, and the record says which gradient it was.
    guard.clip_grad_norm_(
        parts.model.parameters(), parts.clip_norm or math.inf, leave_nonfinite=True
    )
    guard.observe(reported_loss=mean)
    parts.scaler.step(parts.optimizer)
    parts.scaler.update()
    parts.optimizer.zero_grad()
    if guard.step_was_taken():  # a skipped or vetoed step moves neither schedule nor average
        parts.schedule.step()
        parts.averaged.update()
    return parts.processes.mean(mean)


def is_evaluated(epoch: int, config: Config) -> bool:
    """Whether both sets are evaluated after ``epoch``: what is saved always is."""
    last = config.optimization.epochs
    every = (config.runtime.evaluate_every, config.runtime.checkpoint_every)
    return epoch == last or any(epoch % interval == 0 for interval in every)


def evaluate_on(model: nn.Module, examples: Examples, parts: Parts, config: Config) -> Evaluation:
    """Evaluate with the objective and the batches of training, each process on its share."""
    batch_scenes, processes = config.optimization.batch_scenes, parts.processes
    if processes.count == 1:
        return evaluate(model, examples, parts.objective, batch_scenes=batch_scenes)
    own, count = processes.share(torch.arange(len(examples)))
    seen = evaluate(model, examples.select(own), parts.objective, batch_scenes=batch_scenes)
    readings = [seen.loss, seen.source_count_accuracy, *seen.terms.values()]
    weighted = torch.tensor(readings, dtype=torch.float64, device=parts.device) * count
    loss, accuracy, *terms = (processes.mean(weighted) / len(examples)).tolist()
    return Evaluation(
        loss=loss,
        terms=dict(zip(seen.terms, terms, strict=True)),
        source_count_accuracy=accuracy,
    )

"""The training loop: what a run promises, on the full network and a handful of scenes."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

import gradguard as gg
from gradguard.testing import training_fingerprint
from reference_trainer.checkpoint import load_checkpoint
from reference_trainer.data import draw_data
from reference_trainer.reporting import SilentView
from reference_trainer.restore import evaluate_checkpoint
from reference_trainer.settings import as_mapping, preset, with_overrides
from reference_trainer.setup import (
    assemble,
    attach_gate,
    attach_guard,
    look_first,
    pick_device,
)
from reference_trainer.train import train, train_epoch, training_step
from tests.benchmarks.ris import Unwatched

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from reference_trainer.config import Config
    from reference_trainer.results import EpochResult, RunStart, TrainingResult
    from reference_trainer.setup import Parts

CPU = torch.device("cpu")


def tiny(*assignments: str) -> Config:
    """Return a run of a few scenes; the network is the full one."""
    small = ["scenes.train=6", "scenes.validation=3", "optimization.batch_scenes=2"]
    runtime = ["runtime.device=cpu", "runtime.state_every=100"]
    return with_overrides(preset("smoke"), [*small, *runtime, *assignments])


@contextmanager
def watched_run(parts: Parts, config: Config) -> Iterator[gg.Guard]:
    """Attach a gate and a guard as a run does."""
    with attach_gate(parts, config) as gate, attach_guard(parts, config, None, gate=gate) as guard:
        yield guard


class Listener(SilentView):
    """Keeps what a run tells, in order."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def started(self, start: RunStart) -> None:
        """Keep it."""
        self.told.append(start)

    def step_ended(self, record: gg.StepRecord) -> None:
        """Keep it."""
        self.told.append(record.step)

    def epoch_ended(self, result: EpochResult) -> None:
        """Keep it."""
        self.told.append(f"epoch {result.epoch}")


@dataclass(frozen=True)
class Finished:
    """One run with everything it left behind."""

    config: Config
    result: TrainingResult
    directory: Path
    told: list[object]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Return a run of two epochs of three steps, evaluated and saved after the second."""
    config = tiny("network.dropout=0.1", "runtime.evaluate_every=2", "runtime.checkpoint_every=2")
    directory, listener = tmp_path_factory.mktemp("runs") / "one", Listener()
    return Finished(
        config, train(config, run_directory=directory, view=listener), directory, listener.told
    )


def test_every_window_of_every_epoch_takes_its_step(finished: Finished) -> None:
    """Three batches and two epochs are six steps, told in order, each before its epoch ends."""
    result = finished.result
    assert result.log.count(gg.StepOutcome.APPLIED) == len(result.log) == 6
    start, *steps = finished.told
    assert start == result.start
    assert steps == ["epoch 0", 0, 1, 2, "epoch 1", 3, 4, 5, "epoch 2"]
    assert [record.batches for record in result.log] == [1] * 6
    assert result.start.planned_steps == result.epochs[-1].steps_taken == 6
    assert result.log.findings == ()


def test_all_93_tensors_are_live(finished: Finished) -> None:
    """The first look finds the published counts, and a gradient in every tensor."""
    start = finished.result.start
    assert (start.tensors, start.parameters, start.live, start.dead) == (93, 16_339_075, 93, ())


def test_the_same_run_twice_is_the_same_run(finished: Finished) -> None:
    """Same configuration, same machine: the same weights bit for bit, dropout included, whether
    or not the run is recorded.
    """
    again = train(finished.config)
    assert all(map(torch.equal, again.model.parameters(), finished.result.model.parameters()))


def test_what_was_evaluated_is_what_was_saved(finished: Finished) -> None:
    """A checkpoint read back scores exactly what the run told for it, and holds the average."""
    path = finished.directory / "checkpoint.pt"
    again, last = evaluate_checkpoint(path), finished.result.epochs[-1]
    assert (again.memorised, again.held_out) == (last.memorised, last.held_out)
    saved, average = load_checkpoint(path), finished.result.model.state_dict()
    assert all(torch.equal(saved.weights[name], value) for name, value in average.items())
    assert saved.validation_loss == last.held_out.loss


def test_a_run_directory_holds_the_whole_run(finished: Finished) -> None:
    """Configuration, one record a step and one line an epoch, and nothing half written."""
    run = gg.read_run(finished.directory)
    assert run.problems == ()
    assert run.meta.config == as_mapping(finished.config)
    assert list(run.log) == list(finished.result.log)
    lines = (finished.directory / "epochs.jsonl").read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2]
    assert [epoch["held_out"] is None for epoch in epochs] == [False, True, False]
    assert epochs[2]["memorised"]["loss"] == finished.result.memorised[1].loss
    assert sorted(path.name for path in finished.directory.iterdir()) == [
        "checkpoint.pt",
        "epochs.jsonl",
        "run.json",
        "state.pt",
        "steps.jsonl",
    ]


def test_the_first_look_leaves_no_trace() -> None:
    """Rehearsal and measurement change nothing: weights, gradients and random state stay."""
    config = tiny("network.dropout=0.2")
    parts, data = assemble(config, CPU), draw_data(config.scenes, device=CPU)
    before = training_fingerprint(parts.model, parts.optimizer, parts.scaler)
    look_first(parts, data, config, None)
    assert training_fingerprint(parts.model, parts.optimizer, parts.scaler) == before
    assert all(parameter.grad is None for parameter in parts.model.parameters())


@pytest.mark.parametrize(("batch_scenes", "accumulation"), [(2, 3), (4, 2)])
def test_accumulated_micro_batches_are_one_batch(batch_scenes: int, accumulation: int) -> None:
    """Loss, terms and gradient norm of a window are those of all its scenes at once, even where
    its last micro-batch is short.
    """
    scenes = torch.arange(6)
    records = []
    for window in [scenes], list(torch.split(scenes, batch_scenes)):
        config = tiny()
        parts, data = assemble(config, CPU), draw_data(config.scenes, device=CPU)
        with watched_run(parts, config) as guard:
            training_step(parts, data.memorised, window, guard)
        (record,) = guard.log
        records.append(record)
    whole, split = records
    assert split.micro_steps == accumulation
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    assert split.reported_loss == pytest.approx(split.loss, rel=1e-6)
    assert split.terms == pytest.approx(dict(whole.terms), rel=1e-4, abs=1e-7)
    norms = split.gradient_norm_before_clipping, whole.gradient_norm_before_clipping
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_gate_and_the_guard_change_no_weight() -> None:
    """Four steps of the RIS model under gate and guard end in the bits of four bare steps."""
    prints = []
    for watched in (True, False):
        config = tiny("network.dropout=0.1")
        parts, data = assemble(config, CPU), draw_data(config.scenes, device=CPU)
        if watched:
            with watched_run(parts, config) as guard:
                train_epoch(parts, data.memorised, config, guard, 1)
        else:
            train_epoch(parts, data.memorised, config, Bare(), 1)
        prints.append(training_fingerprint(parts.model, parts.optimizer, parts.scaler))
    assert prints[0] == prints[1]


class Bare(Unwatched):
    """Stands where the guard stands and does nothing."""

    def batches(self, loader: object) -> object:
        """Return the loader."""
        return loader


def test_skipped_steps_move_neither_schedule_nor_average() -> None:
    """In fp16 from a scale that overflows, each skipped step is reported as skipped and leaves the
    weights, the learning rate and the average as they were; the steps after it are taken.
    """
    settings = ["precision.mode=fp16", "precision.initial_loss_scale=2**40", "scenes.train=2"]
    config = tiny(*settings)
    parts, data = assemble(config, CPU), draw_data(config.scenes, device=CPU)
    seen = []
    with watched_run(parts, config) as guard:
        for _ in range(2):
            before = [parameter.detach().clone() for parameter in parts.model.parameters()]
            training_step(parts, data.memorised, [torch.arange(2)], guard)
            moved = not all(map(torch.equal, before, parts.model.parameters()))
            seen.append((moved, parts.averaged.taken, parts.schedule.last_epoch))
            parts.scaler.update(2.0**10)
    assert seen == [(False, 0, 0), (True, 1, 1)]
    outcomes = [record.outcome for record in guard.log]
    assert outcomes == [gg.StepOutcome.SKIPPED_BY_SCALER, gg.StepOutcome.APPLIED]


def test_the_gate_keeps_nan_out_of_the_weights() -> None:
    """In fp32 a poisoned batch is vetoed: weights, schedule and average stay as they were."""
    config = tiny()
    parts, data = assemble(config, CPU), draw_data(config.scenes, device=CPU)
    data.memorised.observed.snapshots[0] = torch.nan
    window = [torch.tensor([0, 1])]
    with watched_run(parts, config) as guard:
        before = training_fingerprint(parts.model, parts.optimizer, parts.scaler)
        training_step(parts, data.memorised, window, guard)
        assert training_fingerprint(parts.model, parts.optimizer, parts.scaler) == before
    assert [record.outcome for record in guard.log] == [gg.StepOutcome.VETOED]
    assert parts.averaged.taken == 0


def test_a_few_scenes_are_learnt() -> None:
    """25 steps on four scenes: the evaluated loss falls by more than a quarter."""
    settings = ["scenes.train=4", "optimization.batch_scenes=4", "optimization.epochs=25"]
    result = train(tiny(*settings, "runtime.evaluate_every=25", "runtime.checkpoint_every=25"))
    first, last = result.memorised
    assert last.loss < 0.75 * first.loss
    assert result.live.loss == pytest.approx(last.loss, rel=0.1)


def test_a_missing_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for CUDA where there is none is refused by name; "auto" takes the CPU there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"runtime\.device: got 'cuda'"):
        pick_device("cuda")
    assert pick_device("auto") == CPU


@pytest.mark.gpu
def test_overflowing_steps_are_told_on_cuda() -> None:
    """In fp16 from 2**24 on CUDA the first steps overflow and are all reported as skipped; once a
    step is taken every later one is, and the schedule counts just those.
    """
    settings = ["precision.mode=fp16", "precision.initial_loss_scale=2**24"]
    more = ["scenes.train=32", "optimization.batch_scenes=8", "optimization.epochs=8"]
    result = train(tiny(*settings, *more, "runtime.device=cuda"))
    outcomes = [record.outcome for record in result.log]
    skipped = result.log.count(gg.StepOutcome.SKIPPED_BY_SCALER)
    assert skipped > 0
    assert outcomes[:skipped] == [gg.StepOutcome.SKIPPED_BY_SCALER] * skipped
    assert outcomes[skipped:] == [gg.StepOutcome.APPLIED] * (32 - skipped)
    assert result.epochs[-1].steps_taken == 32 - skipped
    assert result.log.findings == ()


@pytest.mark.gpu
def test_fp16_from_a_high_scale_memorises_as_well_on_cuda() -> None:
    """The whole overfit preset in fp16 from 2**24: only first steps are skipped, and it learns."""
    overrides = ["precision.mode=fp16", "precision.initial_loss_scale=2**24", "runtime.device=cuda"]
    result = train(with_overrides(preset("overfit"), overrides))
    outcomes = [record.outcome for record in result.log]
    skipped = result.log.count(gg.StepOutcome.SKIPPED_BY_SCALER)
    assert outcomes[:skipped] == [gg.StepOutcome.SKIPPED_BY_SCALER] * skipped
    assert outcomes[skipped:] == [gg.StepOutcome.APPLIED] * (240 - skipped)
    first, last = result.memorised
    assert last.loss < 0.2 * first.loss
    assert last.covariance_nmse < 0.35

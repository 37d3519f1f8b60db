"""The guard on the full RIS model: the same bits with it and without it."""

from __future__ import annotations

from dataclasses import replace

import gradguard as gg
from gradguard.testing import TrainingRun, assert_neutral
from reference_trainer.settings import preset
from tests.benchmarks.ris import ris_training


def test_watching_the_ris_model_changes_no_bit():
    """25 steps of the reference trainer's own training step end in identical weights and states."""
    smoke = preset("smoke")
    config = replace(smoke, optimization=replace(smoke.optimization, batch_scenes=2))

    def make_run() -> TrainingRun:
        model, optimizer, step = ris_training(config)
        return TrainingRun(model=model, optimizers=optimizer, step=step)

    def observe(run: TrainingRun) -> gg.Guard:
        return gg.watch(run.model, run.optimizers, detail_every=10, strict=True)

    assert_neutral(make_run, observe)

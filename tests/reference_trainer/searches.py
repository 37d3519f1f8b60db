"""Small searches: with real runs of a few scenes, or with runs that are made up in no time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradguard as gg
from reference_trainer.evaluation import Evaluation
from reference_trainer.results import EpochResult
from reference_trainer.search.cli import evaluated_every_epoch
from reference_trainer.search.space import free_dimensions
from reference_trainer.search.study import SearchPlan
from reference_trainer.settings import as_mapping, preset, with_overrides

if TYPE_CHECKING:
    from pathlib import Path

    from reference_trainer.config import Config
    from reference_trainer.reporting import TrainingView

TINY = (
    "scenes.train=4",
    "scenes.validation=2",
    "optimization.batch_scenes=4",
    "runtime.device=cpu",
)
EPOCHS = 2


def plan_in(
    directory: Path, *assignments: str, n_trials: int = 6, storage: str | None = None, seed: int = 0
) -> SearchPlan:
    """Return the plan that the command line makes of ``assignments`` on a run of four scenes."""
    given = [*TINY, f"optimization.epochs={EPOCHS}", *assignments]
    chosen = with_overrides(preset("smoke"), given)
    return SearchPlan(
        base=evaluated_every_epoch(chosen),
        space=free_dimensions(chosen, fixed={one.partition("=")[0] for one in given}),
        n_trials=n_trials,
        directory=directory,
        storage=storage or f"journal:{directory / 'journal'}",
        study="study",
        seed=seed,
    )


def made_up_error(config: Config, epoch: int) -> float:
    """Return a smooth function of the searched settings with its least value inside the ranges."""
    optimization = config.optimization
    errors = (
        optimization.backbone_learning_rate / 1e-3 - 1,
        optimization.clip_norm / 2 - 1,
        config.network.dropout - 0.1,
    )
    return sum(error**2 for error in errors) + 1 / (1 + epoch)


def made_up_train(
    config: Config,
    *,
    run_directory: Path,
    view: TrainingView,
    error: float | None = None,
    log: gg.RunLog | None = None,
) -> None:
    """Stand where training stands: report :func:`made_up_error` or ``error``, record ``log``."""
    with gg.RunDirectory.create(run_directory, config=as_mapping(config)) as recorder:
        for entry in (*log, *log.findings, *log.facts) if log is not None else ():
            recorder.write(entry)
        for epoch in range(config.optimization.epochs + 1):
            value = made_up_error(config, epoch) if error is None else error
            seen = Evaluation(loss=value, terms={"prediction": value}, source_count_accuracy=0.5)
            view.epoch_ended(
                EpochResult(
                    epoch=epoch,
                    epochs=config.optimization.epochs,
                    steps_taken=epoch,
                    training_loss=value,
                    memorised=seen,
                    held_out=seen,
                )
            )

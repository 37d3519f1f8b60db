"""Everything that is open while a run goes on, put together for a new run or a resumed one."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reference_trainer.annealing import at_epoch
from reference_trainer.data import draw_data
from reference_trainer.epoch_lines import earlier_epochs, rewrite_epochs
from reference_trainer.recording import (
    StateKeeper,
    is_checkpoint_due,
    new_records,
    record_epoch,
)
from reference_trainer.setup import (
    assemble,
    attach_gate,
    attach_guard,
    connected,
    look_first,
    pick_device,
)
from reference_trainer.training_state import Position, put_back

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import gradguard as gg
    from reference_trainer.config import Config
    from reference_trainer.data import DataSets
    from reference_trainer.processes import Processes
    from reference_trainer.reporting import TrainingView
    from reference_trainer.restore import SavedRun
    from reference_trainer.results import EpochResult, RunStart
    from reference_trainer.setup import Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A run that is ready for its next step.

    Attributes:
        config: the whole run.
        directory: the run directory; None when nothing is recorded.
        parts: what a step touches.
        data: what is trained on and what is not.
        start: what was known before the first step.
        guard: watches the run.
        keeper: saves the training state.
        position: how far the run has come; None for a new one.
        epochs: those that are finished.
    """

    config: Config
    directory: Path | None
    parts: Parts
    data: DataSets
    start: RunStart
    guard: gg.Guard
    keeper: StateKeeper
    position: Position | None
    epochs: tuple[EpochResult, ...]

    def record(self, result: EpochResult, *, best: bool) -> None:
        """Write an epoch to the run directory, and checkpoint and state where they are due.

        Args:
            result: the newest epoch.
            best: whether it is the best so far; kept only where training may stop early.
        """
        if self.directory is not None and self.parts.processes.leads:
            best = best and self.config.optimization.patience > 0
            record_epoch(self.directory, self.config, self.parts.averaged.module, result, best=best)
        if is_checkpoint_due(self.config, result):
            self.keeper.save(Position(epoch=result.epoch, finished=result.last))


@contextmanager
def opened(
    config: Config,
    *,
    directory: Path | None,
    saved: SavedRun | None,
    view: TrainingView,
    processes: Processes,
) -> Iterator[Session]:
    """Prepare a run, and close its records, guard and gate when the block ends.

    Args:
        config: the whole run.
        directory: where it is recorded.
        saved: what the run goes on from; None for a new one.
        view: is told what happens.
        processes: those of the run.
    """
    device = pick_device(config.runtime.device)
    state = None if saved is None else saved.state
    with ExitStack() as stack:
        recorder: gg.RunDirectory | None = None
        epochs: tuple[EpochResult, ...] = ()
        if directory is not None and not (state is not None and state.position.finished):
            recorder = new_records(
                directory, config, processes, resumed_from=None if saved is None else saved.position
            )
            stack.enter_context(recorder)
        view.preparing(config)
        data = draw_data(config.scenes, device=device)
        parts = assemble(config, device, processes)
        threads = None if state is None else state.threads
        start = look_first(parts, data, config, directory, threads=threads)
        parts = connected(parts, start)
        gate = stack.enter_context(attach_gate(parts, config))
        if directory is not None and saved is not None:
            epochs = earlier_epochs(directory, state, config)
            if processes.leads:
                rewrite_epochs(directory, epochs)
        if state is not None:
            put_back(state, parts, gate)
            at_epoch(parts, config, state.position.epoch)
        guard = stack.enter_context(attach_guard(parts, config, recorder, gate=gate))
        yield Session(
            config=config,
            directory=directory,
            parts=parts,
            data=data,
            start=replace(start, steps_taken=parts.averaged.taken),
            guard=guard,
            keeper=StateKeeper(directory, parts, gate, config),
            position=None if state is None else state.position,
            epochs=epochs,
        )

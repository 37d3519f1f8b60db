"""What a run reports while it goes on and at its end: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gradguard import Finding, RunLog
    from reference_trainer.evaluation import Evaluation
    from reference_trainer.model import CovarianceNetwork


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """What is known before the first step.

    Attributes:
        tensors: parameter tensors of the network.
        parameters: numbers in them.
        live: tensors that a first backward pass gave a finite gradient that is not all zero.
        dead: names of the others.
        device: where the network runs.
        precision: "fp32", "bf16" or "fp16".
        threads: torch's threads.
        thread_seconds: what a forward and backward pass took, by number of threads; empty when it
            was not measured.
        memorised_scenes: scenes to train on in each epoch.
        held_out_scenes: scenes held out, none of them among the others.
        planned_steps: optimizer steps if none is skipped.
        directory: the run directory; None when nothing is recorded.
        processes: processes that take each step together.
        steps_taken: optimizer steps that were taken before this part of the run; 0 for a new run.
        source: where training scenes come from: "memory", "fly" (fresh ones every epoch) or "disk".
    """

    tensors: int
    parameters: int
    live: int
    dead: tuple[str, ...]
    device: str
    precision: str
    threads: int
    thread_seconds: Mapping[int, float]
    memorised_scenes: int
    held_out_scenes: int
    planned_steps: int
    directory: Path | None
    processes: int = 1
    steps_taken: int = 0
    source: str = "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochResult:
    """One epoch; number 0 is the network before training.

    Attributes:
        epoch: epochs finished.
        epochs: epochs planned.
        steps_taken: optimizer steps taken so far; skipped and vetoed ones are not counted.
        training_loss: mean over the epoch's scenes of the loss that was optimised; None for 0.
        memorised: averaged weights on the training scenes; None when this epoch is not evaluated.
        held_out: the same weights on the held-out scenes.
        findings: what the guard found wrong since the epoch before.
        last: whether training ends with it: as planned, or early.
    """

    epoch: int
    epochs: int
    steps_taken: int
    training_loss: float | None
    memorised: Evaluation | None
    held_out: Evaluation | None
    findings: tuple[Finding, ...] = ()
    last: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """A finished run.

    Attributes:
        start: what was known before the first step.
        epochs: every epoch, from number 0; in a resumed run the earlier ones as they were recorded.
        live: the weights that were optimised, on the training scenes; the evaluations in ``epochs``
            are of the averaged weights.
        log: one record for every optimizer step attempted since the run began or was resumed, and
            the guard's findings.
        model: the averaged weights: what was evaluated and saved.
        wall_s: seconds from the call to the end, setting up included.
    """

    start: RunStart
    epochs: tuple[EpochResult, ...]
    live: Evaluation
    log: RunLog
    model: CovarianceNetwork
    wall_s: float

    @property
    def memorised(self) -> tuple[Evaluation, Evaluation]:
        """The training scenes before the first step and at the end."""
        seen = [epoch.memorised for epoch in self.epochs if epoch.memorised is not None]
        return seen[0], seen[-1]

    @property
    def held_out(self) -> tuple[Evaluation, Evaluation]:
        """The held-out scenes before the first step and at the end."""
        seen = [epoch.held_out for epoch in self.epochs if epoch.held_out is not None]
        return seen[0], seen[-1]

"""The reference trainer's own training step, ready to be timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import gradguard as gg
from reference_trainer.config import Config
from reference_trainer.data import draw_data
from reference_trainer.setup import assemble
from reference_trainer.train import training_step


class Unwatched:
    """Takes the guard's place in the step that is compared with: it listens to nothing."""

    def observe(self, **_: object) -> None:
        """Ignore what is told."""

    def step_was_taken(self) -> bool:
        """Answer as for a run without a scaler and without a gate."""
        return True


def ris_training(
    config: Config,
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[gg.Guard | None], None]]:
    """Return model, optimizer and a step over the batches of ``config``, one after the other."""
    device = torch.device("cpu")
    parts, data = assemble(config, device), draw_data(config.scenes, device=device)
    indices = torch.arange(len(data.memorised)).split(config.optimization.batch_scenes)
    unwatched, turn = Unwatched(), iter(range(10**9))

    def step(guard: gg.Guard | None) -> None:
        window = [indices[next(turn) % len(indices)]]
        training_step(parts, data.memorised, window, guard or unwatched)

    return parts.model, parts.optimizer, step

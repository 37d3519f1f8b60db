"""The reference trainer's own training step, ready to be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import gradguard as gg
from reference_trainer.config import Config
from reference_trainer.data import draw_data
from reference_trainer.setup import assemble
from reference_trainer.train import training_step


class Unwatched:
    """Takes the guard's place in the step that is compared with: it listens to nothing."""

    def observe(self, **_: object) -> None:
        """Ignore what is told."""

    def clip_grad_norm_(
        self, parameters: Iterable[nn.Parameter], max_norm: float, *, leave_nonfinite: bool
    ) -> Tensor:
        """Clip with torch alone."""
        return torch_clipping(list(parameters), max_norm, leave_nonfinite=leave_nonfinite)

    def step_was_taken(self) -> bool:
        """Answer as for a run without a scaler and without a gate."""
        return True


class ClippedByTorch:
    """A guard whose clipping is torch's own, as in a loop that leaves it to ``clip_grad_norm_``."""

    def __init__(self, guard: gg.Guard) -> None:
        self.observe, self.step_was_taken = guard.observe, guard.step_was_taken

    def clip_grad_norm_(
        self, parameters: Iterable[nn.Parameter], max_norm: float, *, leave_nonfinite: bool
    ) -> Tensor:
        """Clip with torch and tell the guard the norm."""
        norm = torch_clipping(list(parameters), max_norm, leave_nonfinite=leave_nonfinite)
        self.observe(gradient_norm=norm)
        return norm


def torch_clipping(
    parameters: Sequence[nn.Parameter], max_norm: float, *, leave_nonfinite: bool = True
) -> Tensor:
    """Return the norm before clipping, which scales nothing that is not finite if so asked."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    used = torch.where(norm.isfinite(), norm, 0.0) if leave_nonfinite else norm
    clip_grads_with_norm_(parameters, max_norm, used)
    return norm


def ris_training(
    config: Config, *, clipped_by_torch: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[gg.Guard | None], None]]:
    """Return model, optimizer and a step over the batches of ``config``, one after the other.

    Args:
        config: of the trainer.
        clipped_by_torch: leave the clipping to torch also where there is a guard.
    """
    device = torch.device("cpu")
    parts, data = assemble(config, device), draw_data(config.scenes, device=device)
    indices = torch.arange(len(data.memorised)).split(config.optimization.batch_scenes)
    unwatched, turn = Unwatched(), iter(range(10**9))

    def step(guard: gg.Guard | None) -> None:
        window = [indices[next(turn) % len(indices)]]
        told = ClippedByTorch(guard) if guard and clipped_by_torch else guard or unwatched
        training_step(parts, data.memorised, window, told)

    return parts.model, parts.optimizer, step

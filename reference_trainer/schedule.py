"""The learning rate over a run: linear warm-up, then a cosine, counted in steps really taken."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def planned_steps(*, scenes: int, batch_scenes: int, accumulation: int, epochs: int) -> int:
    """Return the optimizer steps of a run in which no step is skipped; the last may be partial."""
    batches = math.ceil(scenes / batch_scenes)
    return epochs * math.ceil(batches / accumulation)


def learning_rate_factor(
    taken: int, *, planned: int, warmup_fraction: float, final_fraction: float
) -> float:
    """Return the factor on every base learning rate for the step after ``taken`` taken ones.

    The warm-up rises linearly from one part in its length, never from 0: a learning rate of 0 would
    waste the first step. The cosine reaches ``final_fraction`` on the last planned step and stays.

    Args:
        taken: optimizer steps taken so far; a skipped or vetoed step is not one.
        planned: optimizer steps of the whole run.
        warmup_fraction: share of the planned steps that warm up, 0 for none.
        final_fraction: factor of the last planned step.
    """
    warmup = round(warmup_fraction * planned)
    if taken < warmup:
        return (taken + 1) / warmup
    if taken >= max(1, planned - 1):
        return final_fraction
    progress = (taken - warmup) / max(1, planned - 1 - warmup)
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(
    optimizer: Optimizer, *, planned: int, warmup_fraction: float, final_fraction: float
) -> LambdaLR:
    """Return the schedule as torch's own scheduler; call its ``step()`` after each taken step."""
    factor = partial(
        learning_rate_factor,
        planned=planned,
        warmup_fraction=warmup_fraction,
        final_fraction=final_fraction,
    )
    return LambdaLR(optimizer, factor)

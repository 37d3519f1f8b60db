"""What the published loop did to gradients between the backward pass and the step."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from examples.case_study.faults import Fault


def handle_gradients(
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    faults: frozenset[Fault],
) -> None:
    """Sanitise, unscale, ask for an overflow and clip, in the published order."""
    trained = [p for p in parameters if p.grad is not None]
    if Fault.INF_MAPPED_TO_ONE in faults:
        replace_nonfinite(trained, infinity=1.0)
    elif faults & {Fault.NAN_ZEROED, Fault.DETECTOR_WITH_WRONG_KEY}:
        replace_nonfinite(trained, infinity=inf)
    scaler.unscale_(optimizer)
    if Fault.DETECTOR_WITH_WRONG_KEY in faults and scaler.is_enabled():
        overflow_by_object(scaler, optimizer)
    total = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    nn.utils.clip_grads_with_norm_(trained, 1.0, torch.where(total.isfinite(), total, 0.0))


def replace_nonfinite(parameters: Iterable[nn.Parameter], *, infinity: float) -> None:
    """Write 0 for NaN, and ``infinity`` with its sign for infinities."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(nan=0.0, posinf=infinity, neginf=-infinity)


def overflow_by_object(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Ask the scaler's table under the optimizer itself, which is not its key: never an overflow."""
    state = scaler._per_optimizer_states[optimizer]  # type: ignore[index]  # noqa: SLF001
    return any(float(flag.item()) > 0.0 for flag in state["found_inf_per_device"].values())

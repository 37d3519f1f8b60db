"""What a step gate reads off one attempted step, as tensors on the device, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from gradguard.norms import nonfinite_counts, tensor_norms

Number = TypeVar("Number", Tensor, float)


class Readings(NamedTuple, Generic[Number]):
    """What one attempted step looks like to a policy: 0-dim tensors on the device, or floats later.

    Attributes:
        had_gradient: 1 when some parameter has a gradient, else 0.
        scaler_skips: 1 when the loss scaler has already flagged this step, else 0.
        nonfinite_tensors: number of gradients with a NaN or Inf entry.
        first_nonfinite: position of the first of them among the gradients of this step.
        norm: unscaled L2 norm over the gradients of all parameter groups together.
        has_loss: 1 when the gate was told the loss of this step, else 0.
        loss: that loss; the lowest finite number when there is none.
    """

    had_gradient: Number
    scaler_skips: Number
    nonfinite_tensors: Number
    first_nonfinite: Number
    norm: Number
    has_loss: Number
    loss: Number


def stacked(readings: Readings[Tensor]) -> Tensor:
    """Return the readings as one vector, in the order of the fields. Sync: none."""
    return torch.stack([value.to(readings.norm.dtype) for value in readings])


@torch.no_grad()
def read_step(
    optimizer: Optimizer, parameters: Sequence[Tensor], *, loss: Tensor | float | None
) -> Readings[Tensor]:
    """Read the gradients of ``parameters`` (all have one) and the loss, inside the step's pre-hook.

    Norms are float32 (float64 when a gradient is). In a fused step without an explicit ``unscale_``
    the gradients are still scaled here; they are judged as the kernel will use them. A gradient counts as
    non-finite when its norm is; :func:`recounted` is exact.

    Sync: none.
    """
    norms = _unscaled_norms(optimizer, parameters)
    zero, one = norms.new_zeros(()), norms.new_ones(())
    count, first = _count_and_first(~norms.isfinite())
    return Readings(
        had_gradient=one if parameters else zero,
        scaler_skips=_scaler_skips(optimizer, zero),
        nonfinite_tensors=count,
        first_nonfinite=first,
        norm=torch.linalg.vector_norm(norms),
        has_loss=zero if loss is None else one,
        loss=_loss_like(zero, loss),
    )


@torch.no_grad()
def recounted(
    readings: Readings[Tensor], optimizer: Optimizer, parameters: Sequence[Tensor]
) -> Readings[Tensor]:
    """Return the readings with the gradients that really hold NaN or Inf, entry by entry. Sync: none."""
    if not parameters:
        return readings
    home = readings.norm.device
    counts = [
        nonfinite_counts([_unscaled(optimizer, p)]).sum().to(home, non_blocking=True)
        for p in parameters
    ]
    count, first = _count_and_first(torch.stack(counts) > 0)
    return readings._replace(nonfinite_tensors=count, first_nonfinite=first)


def agreed(readings: Readings[Tensor], group: dist.ProcessGroup | None) -> Readings[Tensor]:
    """Return the largest of every reading over all ranks: the worst loss, any NaN, any signal.

    Readings are combined and not verdicts, so that all ranks also learn the same running estimates, and
    so that "no signal" means that no rank has one. NaN goes its own way through the reduction, where
    MAX leaves it undefined. One all-reduce; none in a single process.

    Sync: none on an accelerator's own back end.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return readings
    values = stacked(readings)
    lost = values.isnan() | values.isneginf()  # -Inf is a non-finite loss, and would lose a MAX
    packed = torch.cat((torch.where(lost, 0.0, values), lost.to(values.dtype)))
    dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)
    largest, any_lost = packed.tensor_split(2)
    return Readings(*torch.where(any_lost > 0, torch.nan, largest).unbind())


def _unscaled_norms(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Tensor:
    if not parameters:
        return torch.zeros(0, device=_home(optimizer))
    norms = tensor_norms([p.grad for p in parameters if p.grad is not None])
    scale = _implicit_scale(optimizer)
    return norms if scale is None else norms / scale.to(norms.device, non_blocking=True)


def _unscaled(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    gradient, scale = parameter.grad, _implicit_scale(optimizer)
    if gradient is None:
        raise ValueError(f"parameter of shape {tuple(parameter.shape)} has no gradient to count in")
    return gradient if scale is None else gradient / scale.to(gradient.device, non_blocking=True)


def _implicit_scale(optimizer: Optimizer) -> Tensor | None:
    """Return the scale that a fused kernel divides by; GradScaler sets it for the time of the step."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale.reshape(()) if isinstance(scale, Tensor) else None


def _scaler_skips(optimizer: Optimizer, zero: Tensor) -> Tensor:
    flag = getattr(optimizer, "found_inf", None)
    if not isinstance(
        flag, Tensor
    ):  # GradScaler leaves the integer 0 where it had nothing to check
        return zero
    return (flag.reshape(()) > 0).to(zero.device, zero.dtype, non_blocking=True)


def _loss_like(zero: Tensor, loss: Tensor | float | None) -> Tensor:
    if loss is None:
        return zero + torch.finfo(zero.dtype).min
    if isinstance(loss, Tensor):
        return loss.to(zero.device, zero.dtype, non_blocking=True)
    return zero + loss


def _count_and_first(bad: Tensor) -> tuple[Tensor, Tensor]:
    if not len(bad):
        return bad.new_zeros((), dtype=torch.int64), bad.new_zeros((), dtype=torch.int64)
    return bad.sum(), bad.int().argmax()


def _home(optimizer: Optimizer) -> torch.device:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    first = next(parameters, None)
    return torch.device("cpu") if first is None else first.device

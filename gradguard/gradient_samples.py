"""Reads a few gradient values before and after every backward pass, and again at the step.

What happens to gradients between backward and step leaves its trace here: gradients that were never cleared,
cleared too early, clipped away, or written over by a sanitizer. Up to three parameters take part, with at
most 256 values each: hooks on all of them would cost more than all other readings together.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradguard.sampling import wide_dtype

_PARAMETERS = 3
_VALUES = 256
_MICRO_STEPS = 64
"""Micro-steps of one window whose beginnings are kept; more are counted as the last of these."""


@dataclass(slots=True)
class _Tracked:
    """What the hooks of one parameter leave behind; holds no parameter."""

    before: list[Tensor | None] = field(default_factory=list)  # squared norm; None for no gradient
    after: Tensor | None = None
    broken: Tensor | None = None


class GradientSamples:
    """Hooks on a few parameters; :meth:`readings` gives what they saw since :meth:`reset`."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._handles = ExitStack()
        self._chosen: list[int] = []
        self._tracked: list[_Tracked] = []
        self.listen(parameters)

    def listen(self, parameters: Sequence[Tensor]) -> None:
        """Listen to the first, middle and last of ``parameters`` that can be sampled."""
        self._handles.close()
        fit = [i for i, p in enumerate(parameters) if p.requires_grad and _can_be_sampled(p)]
        self._chosen = sorted({fit[0], fit[len(fit) // 2], fit[-1]}) if fit else []
        self._tracked = [_Tracked() for _ in self._chosen]
        for index, tracked in zip(self._chosen, self._tracked, strict=True):
            parameter = parameters[index]
            before = parameter.register_hook(_Before(tracked, parameter))  # type: ignore[no-untyped-call]
            self._handles.callback(before.remove)
            after = parameter.register_post_accumulate_grad_hook(_After(tracked))  # type: ignore[no-untyped-call]
            self._handles.callback(after.remove)

    def readings(
        self, gradients: Sequence[Tensor | None], scale: Tensor | None
    ) -> Mapping[str, Tensor]:
        """Return squared norms by name as 1-D tensors; empty when no backward pass was seen. Sync: none.

        ``carried``: before every micro-step (-1 for no gradient at all), of the parameter that saw most of
        them; ``backward``: after the last one; ``step``: now; ``broken``: values that were not finite.

        Args:
            gradients: of all parameters, in the order given to :meth:`listen`.
            scale: what the gradients are still multiplied by, for a fused optimizer; None for nothing.
        """
        seen = [
            (i, t) for i, t in zip(self._chosen, self._tracked, strict=True) if t.after is not None
        ]
        if not seen:
            return {}
        busiest = max((t for _, t in seen), key=lambda one: len(one.before))
        after = torch.stack([t.after for _, t in seen if t.after is not None])
        found = {
            "carried": torch.stack(
                [torch.full_like(after[0], -1.0) if b is None else b for b in busiest.before]
            ),
            "backward": after.sum().reshape(1),
            "broken": torch.stack([t.broken for _, t in seen if t.broken is not None])
            .sum()
            .reshape(1),
        }
        now = [gradients[i] for i, _ in seen]
        present = [_square(g) for g in now if g is not None and _can_be_sampled(g)]
        if present:
            total = torch.stack(present).sum().reshape(1)
            found["step"] = total if scale is None else total / scale.to(total) ** 2
        return found

    def reset(self) -> None:
        """Forget what was seen; the next window begins."""
        for tracked in self._tracked:
            tracked.before.clear()
            tracked.after = tracked.broken = None

    def close(self) -> None:
        """Remove every hook."""
        self._handles.close()
        self.reset()


class _Before:
    """Tensor hook: what the parameter's gradient held when a new one arrived."""

    __slots__ = ("_parameter", "_tracked")

    def __init__(self, tracked: _Tracked, parameter: Tensor) -> None:
        self._tracked = tracked
        # A weak reference: a hook that holds its own parameter is freed only by the garbage collector.
        self._parameter = weakref.ref(parameter)

    def __call__(self, _: Tensor) -> None:
        parameter = self._parameter()
        if parameter is None or len(self._tracked.before) >= _MICRO_STEPS:
            return
        held = parameter.grad
        usable = held is not None and _can_be_sampled(held)
        self._tracked.before.append(_square(held) if usable and held is not None else None)


class _After:
    """Post-accumulate hook: what the parameter's gradient holds after a backward pass."""

    __slots__ = ("_tracked",)

    def __init__(self, tracked: _Tracked) -> None:
        self._tracked = tracked

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is None or not _can_be_sampled(parameter.grad):
            return
        square = _square(parameter.grad)
        broken = (~square.isfinite()).to(square.dtype)
        earlier = self._tracked.broken
        self._tracked.broken = broken if earlier is None else broken + earlier
        self._tracked.after = square


def _can_be_sampled(tensor: Tensor) -> bool:
    """Whether a fixed sample of the values can be looked at without a copy of all of them."""
    plain = tensor.layout is torch.strided and not hasattr(tensor, "to_local")
    return plain and tensor.numel() > 0 and tensor.dtype.itemsize > 1 and not tensor.is_meta


def _square(tensor: Tensor) -> Tensor:
    """Return the sum of squares of at most 256 values at fixed places, 0-dim, in wide precision. Sync: none."""
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    count = min(_VALUES, values.numel())
    if values.numel() > count:
        dense = values.is_contiguous() or _is_channels_last(values)
        # Any order of the values will do, as long as it is the same at every reading.
        stride = values.numel() // count
        values = (
            values.as_strided((count,), (stride,)) if dense else values.flatten()[::stride][:count]
        )
    wide = values.reshape(-1).to(wide_dtype(values.device))
    return torch.dot(wide, wide)


def _is_channels_last(values: Tensor) -> bool:
    return values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)

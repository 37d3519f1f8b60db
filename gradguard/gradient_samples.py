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
NO_GRADIENT = -1.0
"""Stands for the norm where there was no gradient."""
_MICRO_STEPS = 64
"""Micro-steps of one window whose beginnings are kept; more are counted as the last of these."""


@dataclass(slots=True)
class _Tracked:
    """What the hooks of one parameter leave behind; holds no parameter."""

    before: list[Tensor | None] = field(default_factory=list)  # norm; None for no gradient
    after: Tensor | None = None
    every: Tensor | None = None  # sum of the norms after each backward: not finite if one was not
    backwards: int = 0


class GradientSamples:
    """Hooks on a few parameters; :meth:`readings` gives what they saw since :meth:`reset`."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._handles = ExitStack()
        self._chosen: list[int] = []
        self._tracked: list[_Tracked] = []
        self._nothing = torch.tensor(NO_GRADIENT)
        self.listen(parameters)

    @property
    def chosen(self) -> Sequence[int]:
        """Positions of the parameters that are listened to."""
        return self._chosen

    @property
    def backwards(self) -> int:
        """Backward passes that reached one of the parameters since :meth:`reset`."""
        return max((tracked.backwards for tracked in self._tracked), default=0)

    def listen(self, parameters: Sequence[Tensor]) -> None:
        """Listen to the first, middle and last of ``parameters`` that can be sampled."""
        self._handles.close()
        fit = [i for i, p in enumerate(parameters) if p.requires_grad and _can_be_sampled(p)]
        self._chosen = sorted({fit[0], fit[len(fit) // 2], fit[-1]}) if fit else []
        self._tracked = [_Tracked() for _ in self._chosen]
        if fit:
            home = parameters[fit[0]].device
            self._nothing = torch.full((), NO_GRADIENT, dtype=wide_dtype(home), device=home)
        for index, tracked in zip(self._chosen, self._tracked, strict=True):
            parameter = parameters[index]
            before = parameter.register_hook(_Before(tracked, parameter))  # type: ignore[no-untyped-call]
            self._handles.callback(before.remove)
            after = parameter.register_post_accumulate_grad_hook(_After(tracked))  # type: ignore[no-untyped-call]
            self._handles.callback(after.remove)

    def readings(
        self, gradients: Sequence[Tensor | None], scale: Tensor | None
    ) -> Mapping[str, Sequence[Tensor]]:
        """Return norms by name, 0-dim each; empty when no backward pass was seen. Sync: none.

        ``carried``: before every micro-step (:data:`NO_GRADIENT` for none at all), of the parameter that saw
        most of them. Of each parameter: ``backward``: after the last one; ``step``: now; ``every``: sum of
        those after every one.

        Args:
            gradients: of all parameters, in the order given to :meth:`listen`.
            scale: what the gradients are still multiplied by, for a fused optimizer; None for nothing.
        """
        pairs = zip(self._chosen, self._tracked, strict=True)
        seen = [(i, t) for i, t in pairs if t.after is not None]
        if not seen:
            return {}
        busiest = max((t for _, t in seen), key=lambda one: len(one.before))
        found = {
            "carried": [self._nothing if norm is None else norm for norm in busiest.before],
            "backward": [t.after for _, t in seen if t.after is not None],
            "every": [t.every for _, t in seen if t.every is not None],
        }
        now = [gradients[i] for i, _ in seen]
        present = [_norm(g) for g in now if g is not None and _can_be_sampled(g)]
        if present:
            found["step"] = present if scale is None else [n / scale.to(n) for n in present]
        return found

    def reset(self) -> None:
        """Forget what was seen; the next window begins."""
        for tracked in self._tracked:
            tracked.before.clear()
            tracked.after = tracked.every = None
            tracked.backwards = 0

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
        self._tracked.before.append(_norm(held) if usable and held is not None else None)


class _After:
    """Post-accumulate hook: what the parameter's gradient holds after a backward pass."""

    __slots__ = ("_tracked",)

    def __init__(self, tracked: _Tracked) -> None:
        self._tracked = tracked

    def __call__(self, parameter: Tensor) -> None:
        self._tracked.backwards += 1
        gradient = parameter.grad
        if gradient is None or not _can_be_sampled(gradient):
            return
        norm, earlier = _norm(gradient), self._tracked.every
        self._tracked.every = norm if earlier is None else norm + earlier
        self._tracked.after = norm


def _can_be_sampled(tensor: Tensor) -> bool:
    """Whether a fixed sample of the values can be looked at without a copy of all of them."""
    simple = type(tensor) is Tensor or not hasattr(tensor, "to_local")
    plain = simple and tensor.layout is torch.strided
    return plain and tensor.numel() > 0 and tensor.dtype.itemsize > 1 and not tensor.is_meta


def _norm(tensor: Tensor) -> Tensor:
    """Return the norm of at most 256 values at fixed places, 0-dim, in wide precision. Sync: none."""
    values = tensor.detach() if tensor.requires_grad else tensor  # with create_graph=True
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.numel() > _VALUES:
        # Any order of the values will do, as long as it is the same at every reading.
        stride = values.numel() // _VALUES
        dense = values.is_contiguous() or _is_channels_last(values)
        values = (
            values.as_strided((_VALUES,), (stride,))
            if dense
            else values.flatten()[::stride][:_VALUES]
        )
    # One kernel: after a backward pass none of this code is in the processor's cache any more.
    norm: Tensor = torch.linalg.vector_norm(values, dtype=wide_dtype(values.device))
    return norm


def _is_channels_last(values: Tensor) -> bool:
    return values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)

"""Fingerprints of what this process holds, to be compared with those of the other replicas."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradguard.facts import ReplicaReading
from gradguard.sampling import wide_dtype
from gradguard.sensors.batch_stats import row_fingerprints
from gradguard.sensors.pending import FactQueue, Found, number

_VALUES = 256
_LISTENED = 3


class ReplicaWatch:
    """Reads parameters, buffers and gradients of one rank between :meth:`start` and :meth:`stop`.

    The gradient of a rank is read by a hook on up to three parameters before any reduction across ranks.

    Args:
        model: the watched one; only a weak reference is kept.
        queue: takes the readings.
    """

    def __init__(self, model: nn.Module, queue: FactQueue) -> None:
        self._model = weakref.ref(model)
        self._queue = queue
        self._handles: list[Any] = []
        self._local: dict[int, Tensor] = {}
        self._rows: Tensor | None = None
        self._values: dict[str, Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether there are other replicas."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def start(self) -> None:
        """Listen to the gradients of this rank."""
        model = self._model()
        if not self.active or model is None or self._handles:
            return
        for index, parameter in enumerate(self._listened(model)):
            hook = _Local(self._local, index)
            self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    def given(self, inputs: Sequence[Tensor]) -> None:
        """Note the batch of this rank."""
        if self._handles and inputs:
            with torch.no_grad():
                self._rows = row_fingerprints(inputs[0])

    def at_step(self) -> None:
        """Read gradients and their reduction, right before the step is taken. Sync: none."""
        model = self._model()
        # Seldom true, and entering no_grad at every step would cost more than all else here.
        if self._handles and model is not None:
            self._read_gradients(model)

    @torch.no_grad()
    def _read_gradients(self, model: nn.Module) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        reduced = [p.grad for p in self._listened(model) if p.grad is not None]
        if gradients:
            self._values["gradients"] = _fingerprint(gradients)
        if reduced and len(reduced) == len(self._local):
            self._values["reduced"] = torch.stack([_square(g) for g in reduced]).sum().sqrt()
            self._values["local"] = torch.stack(list(self._local.values())).sum().sqrt()

    def stop(self, step: int) -> None:
        """Read parameters and buffers after the step, and queue the reading. Sync: none."""
        model = self._model()
        listening, values = bool(self._handles), self._values
        self.close()
        if listening and model is not None:
            self._read_parameters(step, model, values)

    @torch.no_grad()
    def _read_parameters(self, step: int, model: nn.Module, values: dict[str, Tensor]) -> None:
        values["parameters"] = _fingerprint(list(model.parameters()))
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        if buffers:
            values["buffers"] = _fingerprint(buffers)
        if self._rows is not None:
            values["rows"] = self._rows
        self._rows = None
        who = {"step": step, "rank": dist.get_rank(), "world": dist.get_world_size()}
        self._queue.put(partial(_reading, who), values)

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._values, self._local = {}, {}

    def _listened(self, model: nn.Module) -> list[Tensor]:
        fit = [p for p in model.parameters() if p.requires_grad and _is_plain(p)]
        places = sorted({0, len(fit) // 2, len(fit) - 1})[:_LISTENED] if fit else []
        return [fit[i] for i in places]


class _Local:
    """Tensor hook: the gradient that this rank's own backward passes add up to."""

    __slots__ = ("_found", "_index", "_sum")

    def __init__(self, found: dict[int, Tensor], index: int) -> None:
        self._found, self._index = found, index
        self._sum: Tensor | None = None

    def __call__(self, gradient: Tensor) -> None:
        piece = _piece(gradient)
        self._sum = piece if self._sum is None else self._sum + piece
        self._found[self._index] = torch.dot(self._sum, self._sum)


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not hasattr(tensor, "to_local")
        and not tensor.is_complex()
        and tensor.numel() > 0
    )


def _piece(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:_VALUES].to(wide_dtype(tensor.device))


def _square(tensor: Tensor) -> Tensor:
    piece = _piece(tensor)
    return torch.dot(piece, piece)


def _fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Return one number for the first 256 values of every tensor, equal for equal ones."""
    plain = [_piece(t) for t in tensors if _is_plain(t)]
    if not plain:
        return torch.zeros(())
    values = torch.cat([piece.to(plain[0].device) for piece in plain])
    weights = torch.arange(1, len(values) + 1, device=values.device, dtype=values.dtype).sqrt()
    return torch.dot(values, weights)


def _reading(who: dict[str, int], found: Found) -> ReplicaReading:
    return ReplicaReading(
        **who,
        parameters=found["parameters"][0],
        buffers=number(found, "buffers"),
        gradients=number(found, "gradients"),
        rows=tuple(float(f"{row:.9g}") for row in found.get("rows", ())),
        local_norm=number(found, "local"),
        reduced_norm=number(found, "reduced"),
    )

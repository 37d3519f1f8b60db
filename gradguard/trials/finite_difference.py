"""Compares the gradient of a loss with finite differences of the loss, along the gradient itself.

Along its own direction ``g / |g|`` the derivative of the loss is ``|g|`` if the gradient is right. That one
number is compared with central differences at several distances: agreement at any of them will do, since
kinks and rounding spoil single ones; a gradient is called wrong only where the differences agree among
themselves and not with it.

Source: https://docs.pytorch.org/docs/stable/notes/gradcheck.html.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WHOLE_TOLERANCE = 0.1
"""Relative difference that is allowed along the whole gradient."""

SINGLE_TOLERANCE = 0.2
"""The same along the gradient of one parameter, where fewer values average out."""

_SHARES = (0.1, 0.03, 0.01, 0.003)
"""By which share of itself the loss should change between the two points and their middle."""

_MOST_PARAMETERS = 16
_SETTLED = 0.05
_FARTHEST = 0.02
_NOISE = 1000.0
_PRECISE = (torch.float32, torch.float64, torch.complex64, torch.complex128)

Around = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientAgreement:
    """What the comparison said.

    Attributes:
        disagreement: difference over the larger of both; None when nothing could be said.
        ratio: gradient over finite difference where they disagree; infinite where the loss does not change.
        parameters: names of the parameters whose gradient disagrees.
        compared: along how many directions there was an answer.
        reason: why nothing was compared; None when something was.
    """

    disagreement: float | None = None
    ratio: float | None = None
    parameters: tuple[str, ...] = ()
    compared: int = 0
    reason: str | None = None

    @property
    def right(self) -> bool | None:
        """Whether the gradient agrees; None when that was not found out."""
        return None if self.reason is not None else self.ratio is None


def compare_gradient(
    loss_fn: Callable[[], Tensor], model: nn.Module, around: Around
) -> GradientAgreement:
    """Compare the gradient of ``loss_fn()`` with finite differences, as a whole and by parameter.

    Args:
        loss_fn: computes the loss; the same one at every call from the same random state.
        model: the module with the parameters.
        around: opens a block after which model and random state are as before.

    Sync: waits for the device, up to about 140 forward passes.
    """
    probe = _Probe(loss_fn, dict(model.named_parameters()), around)
    reason = probe.obstacle()
    if reason is not None:
        return GradientAgreement(reason=reason)
    whole = probe.disagreement(list(probe.gradients), WHOLE_TOLERANCE)
    singles = {
        name: found
        for name in _spread(list(probe.gradients))
        if (found := probe.disagreement([name], SINGLE_TOLERANCE)) is not None
    }
    answers = [*singles.values(), *([] if whole is None else [whole])]
    if not answers:
        return GradientAgreement(reason="finite differences of the loss do not settle")
    wrong = {name: one for name, one in singles.items() if one.ratio is not None}
    # Single ones say where; the whole, with their errors averaged, how well it agrees.
    shown = max(wrong.values(), key=lambda one: one.error) if wrong else answers[-1]
    return GradientAgreement(
        disagreement=shown.error,
        ratio=shown.ratio,
        parameters=tuple(wrong),
        compared=len(answers),
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """Relative error along one direction, and gradient over difference where that is too large."""

    error: float
    ratio: float | None = None


class _Probe:
    """The loss around the present weights."""

    def __init__(
        self, loss_fn: Callable[[], Tensor], named: Mapping[str, Tensor], around: Around
    ) -> None:
        self._loss_fn, self._around = loss_fn, around
        self._named = {name: p for name, p in named.items() if p.requires_grad}
        self.gradients: dict[str, Tensor] = {}
        self._loss, self._resolution = math.nan, math.nan

    def obstacle(self) -> str | None:
        """Take the gradient; return why it cannot be compared, or None."""
        odd = [n for n, p in self._named.items() if not _is_plain(p)]
        if odd:
            return f"{odd[0]} is no plain tensor of float32 or float64"
        with self._around():
            for parameter in self._named.values():
                parameter.grad = None
            loss = self._loss_fn()
            if loss.dtype not in _PRECISE:
                return f"the loss is {str(loss.dtype).removeprefix('torch.')}"
            loss.backward()  # type: ignore[no-untyped-call]
            self.gradients = {
                name: p.grad.clone()
                for name, p in self._named.items()
                if p.grad is not None and _is_plain(p.grad) and _norm([p.grad]) != 0.0
            }
            self._loss = float(loss.detach())
            # float32 anywhere bounds what the loss can resolve.
            single = any(p.dtype in (torch.float32, torch.complex64) for p in self._named.values())
            kind = torch.float32 if single or loss.dtype is torch.float32 else torch.float64
            self._resolution = torch.finfo(kind).eps * max(abs(self._loss), 1e-30)
        return self._doubt()

    def _doubt(self) -> str | None:
        norms = [_norm([gradient]) for gradient in self.gradients.values()]
        if not norms:
            return "every gradient is zero"
        if not math.isfinite(self._loss) or not all(map(math.isfinite, norms)):
            return "the loss or its gradient is not finite"
        if self._at(0.0, {}) != self._loss:
            return "the loss is another one at the second call (another batch, most likely)"
        return None

    def disagreement(self, names: list[str], tolerance: float) -> _Answer | None:
        """Compare along the gradient of these parameters; None when that cannot be told."""
        along = {name: self.gradients[name] for name in names}
        slope = _norm(list(along.values()))
        unit = {name: gradient / slope for name, gradient in along.items()}
        measured: list[tuple[float, bool]] = []
        for distance in self._distances(names, slope):
            change = self._at(distance, unit) - self._at(-distance, unit)
            if not math.isfinite(change):
                continue
            difference = change / (2 * distance)
            error = abs(difference - slope) / max(abs(difference), slope)
            if error <= tolerance:
                return _Answer(error)
            loud = max(abs(change), 2 * distance * slope) >= _NOISE * self._resolution
            measured.append((difference, loud))
        return _settled(measured, slope)

    def _distances(self, names: list[str], slope: float) -> list[float]:
        """Return how far to go: so far that the loss changes visibly, but not far from the weights."""
        weight = _norm([self._named[name].detach() for name in names])
        values = sum(self._named[name].numel() for name in names)
        reach = _FARTHEST * max(weight, 0.1 * math.sqrt(values))
        # A loss of all but 0 gives no scale of its own.
        wanted = abs(self._loss) / slope if abs(self._loss) > 1e-6 * slope * reach else reach
        return [share * min(wanted, reach / _SHARES[0]) for share in _SHARES]

    def _at(self, distance: float, unit: Mapping[str, Tensor]) -> float:
        with self._around():
            with torch.no_grad():
                for name, direction in unit.items():
                    self._named[name].add_(direction, alpha=distance)
            return float(self._loss_fn().detach())


def _settled(measured: list[tuple[float, bool]], slope: float) -> _Answer | None:
    """Return the disagreement if two neighbouring differences that are above the noise are alike."""
    for (one, loud), (other, loud_too) in itertools.pairwise(measured):
        alike = abs(one - other) <= _SETTLED * max(abs(one), abs(other), slope)
        if loud and loud_too and alike:
            ratio = slope / other if other else math.inf
            return _Answer(abs(other - slope) / max(abs(other), slope), ratio)
    return None


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.dtype in _PRECISE
        and tensor.layout is torch.strided
        and not hasattr(tensor, "to_local")
    )


def _norm(tensors: list[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(t, dtype=_wide(t)).double() for t in tensors]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _spread(names: list[str]) -> list[str]:
    """Return at most so many names, from first to last."""
    if len(names) <= _MOST_PARAMETERS:
        return names
    last = len(names) - 1
    return [names[round(i * last / (_MOST_PARAMETERS - 1))] for i in range(_MOST_PARAMETERS)]

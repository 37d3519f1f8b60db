"""Clips gradients as torch does, bit for bit, and keeps the norms that were read for it.

A clipping reads every gradient, and so would the guard a moment later: when the guard does the clipping, one
reading serves both.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

_KEPT = 4
"""Clippings that are remembered: GANs and the like clip for several optimizers before they step."""

_WIDE = (torch.float32, torch.float64)
_DEVICES = ("cpu", "cuda")


def clip_grad_norm_(
    parameters: Sequence[Tensor],
    max_norm: float,
    *,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    leave_nonfinite: bool,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Clip as ``torch.nn.utils.clip_grad_norm_`` does; return the total norm before, and all norms after.

    Args:
        parameters: whose gradients are one vector.
        max_norm: of this vector.
        norm_type: as for torch's function.
        error_if_nonfinite: likewise.
        foreach: likewise.
        leave_nonfinite: scale nothing where the total norm is not finite.

    Returns:
        The total norm before (0-dim), the gradients there are, and the L2 norm of each as it is now, of shape
        (gradients,): None where torch's own norms are not what :func:`gradguard.norms.tensor_norms` gives.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite``.

    Sync: none, unless ``error_if_nonfinite``.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = None
    if norm_type == 2 and foreach is None and not error_if_nonfinite and _are_alike(gradients):
        with torch.no_grad():
            norms = torch.stack(torch._foreach_norm(gradients, 2.0))
            total: Tensor = torch.linalg.vector_norm(norms, 2.0)
    else:
        total = get_total_norm(gradients, norm_type, error_if_nonfinite, foreach)
    used = torch.where(total.isfinite(), total, 0.0) if leave_nonfinite else total
    clip_grads_with_norm_(parameters, max_norm, used, foreach)
    if norms is not None:
        norms = norms * (max_norm / (used + 1e-6)).clamp(max=1.0)  # torch's factor
    return total, gradients, norms


def _are_alike(gradients: Sequence[Tensor]) -> bool:
    """Whether torch reads them in one call, and without the overflow of a half precision norm."""
    if not gradients:
        return False
    first = gradients[0]
    dtype, device = first.dtype, first.device
    return (
        dtype in _WIDE
        and device.type in _DEVICES
        and all(
            type(one) is Tensor
            and one.dtype is dtype
            and one.device == device
            and one.layout is torch.strided
            for one in gradients
        )
    )


@dataclass(frozen=True, slots=True)
class _Kept:
    """Norms of gradients as they were at one moment; holds no gradient."""

    norms: Tensor
    gradients: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    places: dict[int, int]  # by id of the gradient


class SharedNorms:
    """L2 norms of the gradients as the last clippings left them.

    They hold for the same tensors until somebody writes to them, which torch counts in their version; not
    counted are writes through ``.data`` or NumPy, and those of ``GradScaler.unscale_``.
    """

    def __init__(self) -> None:
        self._kept: deque[_Kept] = deque(maxlen=_KEPT)

    def keep(self, gradients: Sequence[Tensor], norms: Tensor) -> None:
        """Remember these norms. Sync: none."""
        self._kept.append(
            _Kept(
                norms,
                tuple(weakref.ref(one) for one in gradients),
                tuple(one._version for one in gradients),
                {id(one): place for place, one in enumerate(gradients)},
            )
        )

    def take(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """Return the norms of exactly these tensors, once; None unless all are as they were. Sync: none."""
        for kept in reversed(self._kept):
            places = [kept.places.get(id(one), -1) for one in gradients]
            if -1 in places or not _are_as_kept(gradients, places, kept):
                continue
            for one in gradients:
                kept.places.pop(id(one), None)  # a replayed CUDA graph writes without being counted
            if places == list(range(len(kept.versions))):
                return kept.norms
            each = kept.norms.unbind()  # indexing with numbers of the host would wait
            return torch.stack([each[place] for place in places])
        return None


def _are_as_kept(gradients: Sequence[Tensor], places: Sequence[int], kept: _Kept) -> bool:
    return all(
        kept.gradients[place]() is one and kept.versions[place] == one._version
        for one, place in zip(gradients, places, strict=True)
    )

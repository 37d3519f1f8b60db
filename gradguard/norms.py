"""Norms and non-finite counts of many tensors at once: pure functions, no hooks, no state.

Nothing here writes to its inputs or reads a value on the host; sparse tensors that are not coalesced
are the one exception (see :func:`dense_values`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter

import torch
from torch import Tensor

_FOREACH_DTYPES = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}
"""In which dtype the fast path accumulates, by the dtype of the first tensor."""

_PLAIN = (Tensor, torch.nn.Parameter)

_LARGE = 2**16
"""From how many values on a dot product is worth a call of its own."""

_SMALL = 2**12
"""Up to how many values copying tensors of one shape side by side is cheaper than a kernel for each."""

_TOGETHER = 2**17
"""How many values are copied side by side at most: what stays in the processor's cache."""

_FEWEST = 4
"""From how many tensors of one shape on they are copied side by side."""

_FLOAT8 = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
    }
)


def dense_values(tensor: Tensor) -> Tensor:
    """Return the values of ``tensor`` as one plain, real, dense tensor of a dtype with kernels.

    Complex numbers become pairs of components, sparse tensors their stored values (COO is coalesced
    first: duplicate entries add up), distributed tensors their local shard, float8 becomes float32.
    The result may share memory with the input and must not be written.

    Sync: none, except for an uncoalesced sparse tensor on an accelerator (coalescing waits).
    """
    values = tensor.detach()
    if hasattr(values, "to_local"):
        values = values.to_local()
    if values.layout is torch.sparse_coo:
        values = values.coalesce().values()
    elif values.layout is not torch.strided:
        values = values.values().detach()
    if values.dtype in _FLOAT8:
        return values.float()
    if values.dtype is torch.complex32:
        values = values.to(torch.complex64)
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def tensor_norms(tensors: Sequence[Tensor], *, order: int = 2) -> Tensor:
    """Return the norm of every tensor as a vector of shape ``(len(tensors),)``: L2, or L1 with order 1.

    The L1 norm is 0 exactly when every entry is 0; the squares of an L2 norm underflow below 1e-23.

    Half-precision inputs are accumulated in float32 (their own dtype overflows at 65504); the result is
    float32, or float64 when an input is. A norm can be infinite although every entry is finite: in
    float32 that begins at entries of about 1.8e19.

    Sync: none (see :func:`dense_values` for uncoalesced sparse tensors).
    """
    if not tensors:
        return torch.zeros(0)
    if order == 2 and tensors[0].device.type == "cpu":
        return planned_norms(tensors, norm_plan(tensors))
    with torch.no_grad():
        return _norms_together(tensors, order)


def zero_tests(tensors: Sequence[Tensor], norms: Tensor) -> Tensor:
    """Return a vector with a number for every tensor: 0 exactly when all its entries are 0.

    It is not finite when an entry is not, and else positive. On the CPU that is mostly the L2 norm: only
    where it is 0 or not finite, which squares below 1e-38 and above 3e38 make it too, the tensor is read
    once more. Elsewhere, where a look at the norms would wait, it is the L1 norm.

    Args:
        tensors: at least one, of any kind.
        norms: what :func:`tensor_norms` gave for them.

    Sync: as for :func:`tensor_norms`.
    """
    with torch.no_grad():
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return tensor_norms(tensors, order=1)
        host = torch.empty_like(norms).copy_(norms, non_blocking=True)  # it is on the host already
        doubtful = [i for i, norm in enumerate(host.tolist()) if not 0.0 < norm < math.inf]
        if doubtful:
            host[doubtful] = _zero_tests([tensors[index] for index in doubtful]).to(host.dtype)
        return host


def _zero_tests(tensors: Sequence[Tensor]) -> Tensor:
    """Return the zero test of every tensor on the CPU; small ones of one shape share their kernels."""
    plan = norm_plan(tensors)
    found = [_zero_test(tensors[index]).reshape(1) for index in plan.large]
    for pick in plan.alike:
        alike = pick(tensors)
        found.append(torch.stack(alike).view(len(alike), -1).abs().amax(1))
    found += [_zero_test(tensors[index]).reshape(1) for index in plan.others]
    return torch.cat(found)[plan.places]


def _zero_test(tensor: Tensor) -> Tensor:
    """Return the largest magnitude, which neither underflows nor overflows; the L1 norm where there is none."""
    if not _is_plain_float32(tensor) or tensor.numel() == 0:
        return tensor_norms([tensor], order=1)[0]
    return torch.stack(torch.aminmax(tensor)).abs().amax()


def planned_norms(tensors: Sequence[Tensor], plan: NormPlan) -> Tensor:
    """Return the L2 norms of :func:`tensor_norms`, without working out anew how they are read best.

    Args:
        tensors: at least one, of any kind.
        plan: of tensors like these; one that does not fit costs time and changes no norm.

    Sync: as for :func:`tensor_norms`.
    """
    with torch.no_grad():
        if tensors[0].device.type == "cpu":
            try:
                return _norms_by_plan(tensors, plan)
            except RuntimeError:
                pass  # several devices, or a plan that does not fit
        return _norms_together(tensors, 2)


def _norms_together(tensors: Sequence[Tensor], order: int) -> Tensor:
    """Return the norms in one call where torch can: it takes no sparse, distributed or mixed tensors."""
    first = tensors[0]
    if type(first) in _PLAIN and first.dtype in _FOREACH_DTYPES:
        try:
            wide = _FOREACH_DTYPES[first.dtype]
            return torch.stack(torch._foreach_norm(list(tensors), order, dtype=wide))
        except (NotImplementedError, RuntimeError):
            # Asking every tensor first would cost as much as the norms of small ones.
            return _norms_one_by_one(tensors, order)
    return _norms_one_by_one(tensors, order)


@dataclass(frozen=True, slots=True)
class NormPlan:
    """How the L2 norms of some tensors on the CPU are read in few kernels.

    A large float32 tensor is a dot product: it reads memory half as fast again as torch's norm, and is off
    by 1e-5 instead of 3e-4 for ten million values. Small tensors of one shape are copied side by side and
    share one kernel.

    Attributes:
        count: number of tensors.
        large: positions of the large tensors.
        alike: picks some small tensors of one shape, for each such group.
        others: positions of all others.
        places: where the norm of each tensor stands when these have been read one after the other.
    """

    count: int
    large: tuple[int, ...]
    alike: tuple[Callable[[Sequence[Tensor]], tuple[Tensor, ...]], ...]
    others: tuple[int, ...]
    places: Tensor


def norm_plan(tensors: Sequence[Tensor]) -> NormPlan:
    """Return the plan for these tensors, and for all that are like them.

    Making it costs as much as the norms of small tensors. Sync: none.
    """
    shapes: dict[torch.Size, list[int]] = {}
    large: list[int] = []
    others: list[int] = []
    for index, tensor in enumerate(tensors):
        if not _is_plain_float32(tensor) or tensor.numel() == 0:
            others.append(index)
        elif tensor.numel() <= _SMALL:
            shapes.setdefault(tensor.shape, []).append(index)
        else:
            large_enough = tensor.numel() >= _LARGE and tensor.is_contiguous()
            (large if large_enough else others).append(index)
    groups = [group for members in shapes.items() for group in _groups(*members)]
    alike = [group for group in groups if len(group) >= _FEWEST]
    others += [index for group in groups if len(group) < _FEWEST for index in group]
    read = [*large, *chain.from_iterable(alike), *others]
    return NormPlan(
        count=len(tensors),
        large=tuple(large),
        alike=tuple(itemgetter(*group) for group in alike),
        others=tuple(others),
        places=torch.tensor(read, dtype=torch.int64).argsort(),
    )


def _groups(shape: torch.Size, members: list[int]) -> list[list[int]]:
    """Return the members in groups that are not too large to be copied together."""
    most = _TOGETHER // shape.numel()
    return [members[start : start + most] for start in range(0, len(members), most)]


def _norms_by_plan(tensors: Sequence[Tensor], plan: NormPlan) -> Tensor:
    """Return the L2 norms; a tensor that is not what the plan takes it for raises RuntimeError."""
    if len(tensors) != plan.count:
        raise RuntimeError(f"a plan for {plan.count} tensors was given {len(tensors)}")
    found: list[Tensor] = []
    if plan.large:
        found.append(torch.stack([_square(tensors[index]) for index in plan.large]).sqrt_())
    found += [_norms_side_by_side(pick(tensors)) for pick in plan.alike]
    if plan.others:
        found.append(_norms_together([tensors[index] for index in plan.others], 2))
    return torch.cat(found)[plan.places]


def _square(tensor: Tensor) -> Tensor:
    if not _is_plain_float32(tensor):
        raise RuntimeError("planned as a plain float32 tensor, which it is no longer")
    flat = tensor.view(-1)  # raises where the values do not lie one after the other
    return torch.dot(flat, flat)


def _norms_side_by_side(alike: tuple[Tensor, ...]) -> Tensor:
    """Return the norms of tensors of one shape; torch.stack raises for different shapes and devices."""
    rows = torch.stack(alike)
    if not _is_plain_float32(rows):
        raise RuntimeError("planned as plain float32 tensors, which they are no longer")
    norms: Tensor = torch.linalg.vector_norm(rows.view(len(alike), -1), dim=1)
    return norms


def _is_plain_float32(tensor: Tensor) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.dtype is torch.float32
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
    )


def _norms_one_by_one(tensors: Sequence[Tensor], order: int) -> Tensor:
    """Return the same as :func:`tensor_norms`, for every mixture of layouts, dtypes and devices."""
    values = [dense_values(t) for t in tensors]
    wide = torch.float64 if any(v.dtype is torch.float64 for v in values) else torch.float32
    device = values[0].device
    norms = [torch.linalg.vector_norm(v, order, dtype=wide) for v in values]
    return torch.stack([n.to(device, non_blocking=True) for n in norms])


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors as one vector: a 0-dim tensor; 0 for no tensors.

    It is torch's "total norm", accumulated in float32 for half precision. NaN anywhere gives NaN.

    Sync: none.
    """
    total: Tensor = torch.linalg.vector_norm(tensor_norms(tensors))
    return total


def nonfinite_counts(tensors: Sequence[Tensor]) -> Tensor:
    """Return the numbers of NaN and Inf entries per tensor: int64 of shape ``(2, len(tensors))``.

    Complex tensors are counted by component. Exact, and dearer than a norm (two passes): meant for the
    steps where :func:`tensor_norms` says that something is wrong.

    Sync: none.
    """
    if not tensors:
        return torch.zeros((2, 0), dtype=torch.int64)
    with torch.no_grad():
        values = [dense_values(t) for t in tensors]
        device = values[0].device
        nan = [v.isnan().sum().to(device, non_blocking=True) for v in values]
        inf = [v.isinf().sum().to(device, non_blocking=True) for v in values]
        return torch.stack((torch.stack(nan), torch.stack(inf)))

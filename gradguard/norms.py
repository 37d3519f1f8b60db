"""Norms and non-finite counts of many tensors at once: pure functions, no hooks, no state.

Nothing here writes to its inputs or reads a value on the host; sparse tensors that are not coalesced
are the one exception (see :func:`dense_values`).
"""

from __future__ import annotations

from collections.abc import Sequence

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
    first = tensors[0]
    with torch.no_grad():
        if type(first) is Tensor and first.dtype in _FOREACH_DTYPES:
            try:
                return _norms_together(tensors, order, _FOREACH_DTYPES[first.dtype])
            except (NotImplementedError, RuntimeError):
                # A mixture: sparse or distributed tensors, several devices, float64 among float32.
                # Asking every tensor first would cost as much as the norms of small ones.
                return _norms_one_by_one(tensors, order)
        return _norms_one_by_one(tensors, order)


def _norms_together(tensors: Sequence[Tensor], order: int, wide: torch.dtype | None) -> Tensor:
    """Return the norms in one call, but for large float32 tensors on the CPU, which are dot products.

    There a dot product reads memory half as fast again as torch's norm, and is off by 1e-5 instead of
    3e-4 for ten million values.
    """
    large = [i for i, t in enumerate(tensors) if order == 2 and _is_large(t)]
    if not large:
        return torch.stack(torch._foreach_norm(list(tensors), order, dtype=wide))
    chosen = set(large)
    small = [t for i, t in enumerate(tensors) if i not in chosen]
    norms = list(torch._foreach_norm(small, order, dtype=wide)) if small else []
    for index in large:  # in ascending order: each lands where it belongs
        flat = tensors[index].detach().view(-1)
        norms.insert(index, torch.dot(flat, flat).sqrt_())
    return torch.stack(norms)


def _is_large(tensor: Tensor) -> bool:
    return (
        tensor.numel() >= _LARGE
        and type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
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

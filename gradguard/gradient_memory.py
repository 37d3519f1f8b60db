"""The memory of one gradient, whatever its dtype and layout: reach it, and write 0 for NaN in it."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex128,
    torch.complex64,
    torch.complex32,
    *_FLOAT8,
)
_LAYOUTS = (
    torch.strided,
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
    torch.jagged,
)


def gradient_memory(name: str, gradient: Tensor) -> Tensor:
    """Return the gradient as a dense or COO tensor that shares its memory, or refuse its kind.

    Of a distributed gradient it is this rank's shard, of a jagged or compressed one its values.

    Args:
        name: name of the parameter, for the message.
        gradient: what its ``.grad`` holds.

    Raises:
        TypeError: there are no values to read, no NaN or no zero in the dtype, or the layout is unknown.

    Sync: none.
    """
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    if local.is_meta:
        raise TypeError(
            f"sanitizing gradients: {name} has a gradient on the meta device: no values"
        )
    if local.dtype not in _DTYPES:
        raise TypeError(
            f"sanitizing gradients: {name} has a gradient of dtype {local.dtype}, which has no NaN or "
            f"no zero; known: {', '.join(str(dtype) for dtype in _DTYPES)}"
        )
    if local.layout not in _LAYOUTS or (local.is_nested and local.layout == torch.strided):
        raise TypeError(
            f"sanitizing gradients: {name} has a gradient of layout "
            f"{'nested' if local.is_nested else local.layout}; known: "
            f"{', '.join(str(layout) for layout in _LAYOUTS)}"
        )
    if local.layout in (torch.strided, torch.sparse_coo):
        return local
    return local.values().detach()  # without detach, views of compressed values have no kernels


def count_entries(gradient: Tensor) -> int:
    """Return how many real numbers there are; complex entries have two, COO counts after coalescing.

    Args:
        gradient: a result of :func:`gradient_memory`.

    Sync: none, except for an uncoalesced COO tensor on an accelerator.
    """
    stored = gradient.coalesce().values() if gradient.layout is torch.sparse_coo else gradient
    return stored.numel() * (2 if stored.is_complex() else 1)


def zero_nan_(gradient: Tensor) -> None:
    """Write 0 for NaN and change no other bit. Masks keep them; arithmetic would not.

    Args:
        gradient: a result of :func:`gradient_memory`. COO duplicates are added up first, in place.

    Sync: none, except for an uncoalesced COO tensor on an accelerator.
    """
    values = _writable_values(gradient)
    if values.dtype in _FLOAT8:  # no kernels: compare as float32, write the bits of zero
        values.view(torch.uint8).masked_fill_(values.float().isnan(), 0)
    else:
        values.masked_fill_(values.isnan(), 0.0)


def _writable_values(gradient: Tensor) -> Tensor:
    """Return a real view of the gradient's own memory in which every number appears once."""
    values = gradient
    if gradient.layout is torch.sparse_coo:
        if not gradient.is_coalesced():  # zeroing duplicates one by one leaves NaN: inf + -inf
            gradient.copy_(gradient.coalesce())
        values = gradient.values().detach()
    for dim, stride in enumerate(values.stride()):
        if stride == 0 and values.shape[dim] > 1:  # expanded: many entries, one number
            values = values.narrow(dim, 0, 1)
    if values.is_complex():  # a conjugated view conjugated again is plain memory
        values = torch.view_as_real(values.conj() if values.is_conj() else values)
    return values

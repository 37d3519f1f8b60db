"""What is known about a tensor and about the memory it lives in, without keeping either alive."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class TensorTable(Generic[T]):
    """A value per tensor object."""

    def __init__(self) -> None:
        self._values = WeakTensorKeyDictionary()

    def get(self, tensor: Tensor) -> T | None:
        """Return what was kept about a tensor; None for nothing."""
        found: T | None = self._values.get(tensor)  # type: ignore[no-untyped-call]
        return found

    def __setitem__(self, tensor: Tensor, value: T) -> None:
        self._values[tensor] = value

    def __len__(self) -> int:
        return len(self._values)


class StorageTable(Generic[T]):
    """A value per piece of memory, shared by all tensors that view it.

    A weak reference keeps torch's address of the piece from being used again, not the memory itself.
    """

    def __init__(self) -> None:
        self._values: dict[int, tuple[StorageWeakRef, T]] = {}

    def get(self, tensor: Tensor) -> T | None:
        """Return what was kept about the memory of a tensor; None for nothing."""
        reference = _reference(tensor)
        found = None if reference is None else self._values.get(reference.cdata)
        return None if found is None else found[1]

    def __setitem__(self, tensor: Tensor, value: T) -> None:
        reference = _reference(tensor)
        if reference is not None:
            self._values[reference.cdata] = (reference, value)


def _reference(tensor: Tensor) -> StorageWeakRef | None:
    if tensor.layout is not torch.strided or hasattr(tensor, "to_local"):
        return None
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (
        NotImplementedError,
        RuntimeError,
    ):  # wrappers of torch.func have no memory of their own
        return None

"""The sync lint: which lines of a piece of code make the host wait for the device?

On a GPU an innocent ``loss.item()`` stops the program until every queued kernel has finished. This
lint finds such reads without a GPU: it watches the operations that a function dispatches and counts
those whose result the host must know before it can go on. The CPU plays the device's part, so the
same check runs in CI on any machine.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

_VALUE_IS_THE_RESULT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""torch's own tags for operations whose Python result, or result shape, depends on values."""

_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")
"""Tagged or not, these read values only when an index is a boolean mask."""

_COPIES = ("aten::copy_", "aten::_to_copy")

_UNSEEN_BY_DISPATCH = ("tolist", "numpy", "__array__", "cpu")
"""Methods that read a CPU tensor's memory without dispatching any operation."""

_LIBRARY_FOLDERS = (str(Path(torch.__file__).parent), __file__)


@dataclass(frozen=True, slots=True)
class HostRead:
    """One read that makes the host wait for the device.

    Attributes:
        operation: what was called, for example ``"aten::_local_scalar_dense"`` for ``.item()``.
        where: ``file:line`` of the innermost caller outside torch.
    """

    operation: str
    where: str


class HostReads:
    """Record every host read in a ``with`` block; see :attr:`reads` and :attr:`counts`.

    Counted are ``.item()``, ``float(t)``, ``if t``, ``.tolist()``, ``.numpy()``, ``.cpu()``,
    printing, ``nonzero``, boolean masks, ``unique``, ``equal`` and every other operation that torch
    tags as data-dependent, and blocking copies from another device to the CPU. A tensor that was
    filled by ``copy_(..., non_blocking=True)`` stands for host memory from then on: reading it does
    not count, because that is how values leave a device without waiting.

    What it cannot see: reads inside C++ and compiled regions, blocking copies from pageable host
    memory to a device, and ``Tensor.to("cpu")`` of a tensor that is on the CPU already.

    Sync: none of its own.

    Args:
        device: type of the device whose tensors must not be read. With the default, ``"cpu"``, the
            CPU plays the device, which also counts reads of values that live on the host on purpose
            (the step counters of an unfused Adam, for one).
    """

    def __init__(self, *, device: str = "cpu") -> None:
        self.reads: list[HostRead] = []
        self._device = torch.device(device).type
        self._host_memory: dict[int, Tensor] = {}  # by address; kept alive so that it is not reused
        self._modes = ExitStack()

    @property
    def counts(self) -> Counter[str]:
        """How often each operation read the device."""
        return Counter(read.operation for read in self.reads)

    def __enter__(self) -> Self:
        """Start recording."""
        self._modes.enter_context(_FunctionLint(self._saw_method))
        self._modes.enter_context(_DispatchLint(self._saw_operation))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop recording; the reads stay available."""
        self._modes.close()
        self._host_memory.clear()

    def _saw_operation(
        self, name: str, function: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> None:
        tensors = _tensors_in(args)
        if name == "aten::copy_" and _is_non_blocking(args, kwargs):
            self._host_memory[_address(args[0])] = args[0]
        elif _waits(name, function, args, kwargs) and any(map(self._is_watched, tensors)):
            self._note(name)

    def _saw_method(self, function: Any, args: Any) -> None:
        name = getattr(function, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is None or not self._is_watched(tensor):
            return
        is_unseen = name in _UNSEEN_BY_DISPATCH and tensor.device.type == "cpu"
        prints = name == "__repr__" or (name == "__format__" and tensor.dim() > 0)
        if is_unseen or prints:
            self._note(f"Tensor.{name}")

    def _is_watched(self, tensor: Tensor) -> bool:
        if tensor.device.type != self._device:
            return False
        return tensor.layout != torch.strided or _address(tensor) not in self._host_memory

    def _note(self, operation: str) -> None:
        self.reads.append(HostRead(operation, _caller()))


class _DispatchLint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every dispatched operation to ``saw(name, function, args, kwargs)``."""

    def __init__(self, saw: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._saw = saw

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._saw(func.name().split(".")[0], func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _FunctionLint(TorchFunctionMode):
    """Shows every tensor method to ``saw(function, args)``."""

    def __init__(self, saw: Callable[..., None]) -> None:
        super().__init__()
        self._saw = saw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._saw(func, args)
        return func(*args, **(kwargs or {}))


def count_host_reads(function: Callable[[], object]) -> Counter[str]:
    """Call ``function`` once and return how often each operation made the host read the device."""
    with HostReads() as lint:
        function()
    return lint.counts


def assert_no_host_reads(
    function: Callable[[], object], *, allowed: Mapping[str, int] | None = None
) -> None:
    """Call ``function`` once and fail if it reads the device more often than ``allowed``.

    Args:
        function: the work to look at, for example one guarded training step.
        allowed: reads per operation that are somebody else's, as :func:`count_host_reads` gives
            them for the same work without the code under test. None: nothing is allowed.

    Raises:
        AssertionError: naming each surplus operation, how often, and the lines that called it.
    """
    with HostReads() as lint:
        function()
    surplus = lint.counts - Counter(allowed or {})
    if surplus:
        raise AssertionError("\n".join(_complaint(lint, name, surplus[name]) for name in surplus))


def _complaint(lint: HostReads, operation: str, surplus: int) -> str:
    lines = sorted({read.where for read in lint.reads if read.operation == operation})
    return (
        f"{operation} makes the host wait for the device {surplus} time(s) more than allowed; "
        f"called at {', '.join(lines)}. Keep the value in a 0-dim tensor and read it later, or not."
    )


def _waits(name: str, function: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether this operation needs a value from the device before the host can go on."""
    if name in _INDEXING:
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors_in(args[1]))
    if name in _COPIES:
        return _leaves_the_device(name, args, kwargs)
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    return not _VALUE_IS_THE_RESULT.isdisjoint(function.tags)


def _leaves_the_device(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    source = args[1] if name == "aten::copy_" else args[0]
    target = args[0].device if name == "aten::copy_" else kwargs.get("device")
    crosses = target is not None and target.type == "cpu" and source.device.type != "cpu"
    return crosses and not _is_non_blocking(args, kwargs)


def _is_non_blocking(args: Any, kwargs: Mapping[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))


def _tensors_in(args: Any) -> list[Tensor]:
    flat = (entry for arg in args for entry in (arg if isinstance(arg, list | tuple) else (arg,)))
    return [entry for entry in flat if isinstance(entry, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _caller() -> str:
    for frame, line in traceback.walk_stack(None):
        if not frame.f_code.co_filename.startswith(_LIBRARY_FOLDERS):
            return f"{frame.f_code.co_filename}:{line}"
    return "unknown"

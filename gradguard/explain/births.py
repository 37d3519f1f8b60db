"""Keeps book of the forward pass: which operation made which tensor out of which, and what was not finite.

An Inf that was written down on purpose, as in an attention mask, is no fault; a NaN made of it is.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import Node

from gradguard.explain.graph import leaf_of, operation_name
from gradguard.explain.places import Spot, describe
from gradguard.explain.readings import FlagRoll, Flags
from gradguard.explain.results import NonfiniteOrigin
from gradguard.explain.tables import StorageTable, TensorTable
from gradguard.explain.tracing import Call, plain_name

_MOST_CALLS = 200_000
_INPUT = "input"
_KEY = "gradguard"


class Value(NamedTuple):
    """A tensor as an operation read it: number of its flags, and the operation that made it."""

    flags: int
    maker: int | None
    label: str
    version: int


@dataclass(slots=True)
class Made:
    """One operation of the forward pass."""

    op: str
    spot: Spot | None
    reads: tuple[Value, ...]
    constant: bool  # an infinite number was written into the call
    outputs: tuple[int, ...] = ()


@dataclass(slots=True)
class BirthLedger:
    """A bookkeeper of values; holds no tensor but flags.

    Args:
        parameters: pairs of name and parameter.
        values: whether to look at values; otherwise only the places of graph nodes are noted.
    """

    parameters: Sequence[tuple[str, Tensor]]
    values: bool = True
    calls: list[Made] = field(default_factory=list)
    _names: dict[int, tuple[weakref.ref[Tensor], str]] = field(init=False)
    _roll: FlagRoll = field(default_factory=FlagRoll)
    _known: TensorTable[Value] = field(default_factory=TensorTable)
    _writers: StorageTable[int] = field(default_factory=StorageTable)
    _reads: tuple[Value, ...] = ()
    _token: int = field(
        default_factory=itertools.count().__next__
    )  # a graph may outlive its ledger

    def __post_init__(self) -> None:
        """Note the parameters' names and let go of them."""
        self._names = {id(p): (weakref.ref(p), name) for name, p in self.parameters}
        self.parameters = ()

    def before(self, call: Call) -> None:
        """Look at the arguments while they are what the operation will see."""
        for tensor in call.inputs:
            self._mark_hidden(tensor)
        if self.values:
            self._reads = tuple(self.look(t) for t in call.inputs if _is_number(t))

    def after(self, call: Call) -> None:
        """Look at the results."""
        outputs = [t for t in call.outputs if _is_number(t)]
        if not outputs:
            return
        if len(self.calls) >= _MOST_CALLS:
            raise RuntimeError(
                f"noting the operations of a step: more than {_MOST_CALLS}; explain a smaller part"
            )
        number = len(self.calls)
        made = Made(call.op, call.spot, self._reads, call.has_infinite_constant)
        self.calls.append(made)
        for tensor in outputs:
            value = Value(self._take(tensor), number, "", _version(tensor))
            self._known[tensor] = value
            made.outputs += (value.flags,)
            if call.target is tensor:
                self._writers[tensor] = number
        self._mark_nodes(outputs, number)

    def call_of(self, node: Node) -> int | None:
        """Return the number of the operation that made a graph node; None for one that was not seen."""
        return self._mark_of(node)[1]

    def look(self, tensor: Tensor) -> Value:
        """Return what is known about a tensor; look at it if it is new or was changed through a view."""
        version = _version(tensor)
        known = self._known.get(tensor)
        if known is not None and known.version == version:
            return known
        maker = self._writers.get(tensor)
        if maker is None and known is not None:
            maker = known.maker
        value = Value(self._take(tensor), maker, self._label(tensor), version)
        self._known[tensor] = value
        return value

    def origin(self, value: Value) -> NonfiniteOrigin | None:
        """Say where the NaN or Inf in a traced tensor came from; None if it is finite. Sync: yes."""
        flags = self._roll.read()
        if not flags[value.flags].bad:
            return None
        if value.maker is None:
            return _origin("the loss", None, flags[value.flags], value.label)
        return self._trace(value.maker, flags, flags[value.flags])

    def origin_of_call(self, number: int) -> NonfiniteOrigin | None:
        """Say where a NaN or Inf among the arguments of an operation came from; None for none. Sync: yes."""
        flags = self._roll.read()
        benign = self._benign(flags)
        bad = self._bad_read(self.calls[number], flags, benign)
        if bad is None:
            return None
        if bad.maker is None:
            made = self.calls[number]
            return _origin(made.op, made.spot, flags[bad.flags], bad.label)
        return self._trace(bad.maker, flags, flags[bad.flags])

    def _trace(self, number: int, flags: list[Flags], value: Flags) -> NonfiniteOrigin:
        """Go back from an operation with a bad result to the first one on the way."""
        benign = self._benign(flags)
        while True:
            made = self.calls[number]
            bad = self._bad_read(made, flags, benign)
            if bad is None:
                return _origin(made.op, made.spot, value, None)
            value = flags[bad.flags]
            if bad.maker is None:
                return _origin(made.op, made.spot, value, bad.label)
            number = bad.maker

    def _bad_read(self, made: Made, flags: list[Flags], benign: list[bool]) -> Value | None:
        """Return the argument that is to blame: NaN before Inf; None when it is the operation itself."""
        bad = [r for r in made.reads if flags[r.flags].bad and not _excused(r, flags, benign)]
        return min(bad, key=lambda one: not flags[one.flags].nan, default=None)

    def _benign(self, flags: list[Flags]) -> list[bool]:
        """Say of every operation whether its result holds no NaN and only an Inf made on purpose."""
        benign: list[bool] = []
        for made in self.calls:
            bad = [r for r in made.reads if flags[r.flags].bad]
            on_purpose = made.constant or (
                bool(bad) and all(_excused(r, flags, benign) for r in bad)
            )
            benign.append(on_purpose and not any(flags[i].nan for i in made.outputs))
        return benign

    def _take(self, tensor: Tensor) -> int:
        return self._roll.take(tensor) if self.values else -1

    def _label(self, tensor: Tensor) -> str:
        found = self._names.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        return _INPUT if tensor.grad_fn is None else operation_name(tensor.grad_fn)

    def _mark_hidden(self, tensor: Tensor) -> None:
        """Mark the node of an argument that no call was seen to make.

        For a custom Function it is the last call inside of it; a node from before has no place, and
        must not get that of the call which uses it.
        """
        node = tensor.grad_fn
        if node is not None and not self._mark_of(node)[0]:
            known = self._known.get(tensor)
            self._mark(node, None if known is None else known.maker)

    def _mark_nodes(self, outputs: Iterable[Tensor], number: int) -> None:
        """Write the operation's number on every new graph node; it goes when the graph goes."""
        stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
        while stack:
            node = stack.pop()
            if leaf_of(node) is None and not self._mark_of(node)[0]:
                self._mark(node, number)
                stack += [n for n, _ in node.next_functions if n is not None]

    def _mark(self, node: Node, number: int | None) -> None:
        metadata = cast("dict[str, object]", node.metadata)
        metadata[_KEY] = (self._token, number)

    def _mark_of(self, node: Node) -> tuple[bool, int | None]:
        """Return whether this ledger has marked a node, and with which number."""
        found = cast("dict[str, tuple[int, int | None]]", node.metadata).get(_KEY)
        return (True, found[1]) if found is not None and found[0] == self._token else (False, None)


def _excused(read: Value, flags: list[Flags], benign: list[bool]) -> bool:
    """Whether an argument holds nothing worse than an Inf that was put there on purpose."""
    if flags[read.flags].nan:
        return False
    return read.label == _INPUT if read.maker is None else benign[read.maker]


def _version(tensor: Tensor) -> int:
    """Return how often a tensor or a view of it was changed in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 (no public name)


def _is_number(tensor: Tensor) -> bool:
    """Whether a tensor can hold NaN; the wrappers of torch.func are not to be used outside of it."""
    numeric = tensor.is_floating_point() or tensor.is_complex()
    return numeric and not is_functorch_wrapped_tensor(tensor)


def _origin(op: str, spot: Spot | None, flags: Flags, entered: str | None) -> NonfiniteOrigin:
    place = describe(spot)
    return NonfiniteOrigin(
        op=plain_name(op),
        phase="forward",
        value=flags.value,
        module=place.module,
        line=place.line,
        source=place.source,
        entered=entered or None,
    )

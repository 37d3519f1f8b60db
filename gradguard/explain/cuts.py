"""Keeps book of where tensors leave the autograd graph, and which parameters that cuts off.

Two things are known per tensor: the parameters whose values are in it through a live path (a set of
bits), and the cuts behind it: events that its value passed through.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gradguard.explain.graph import leaves_behind
from gradguard.explain.places import Modules, Spot, describe, last_line_with
from gradguard.explain.results import CutReason, PathCut
from gradguard.explain.tables import StorageTable, TensorTable
from gradguard.explain.tracing import Call, grad_mode_off, plain_name

_BY_NAME = {
    "detach": CutReason.DETACH,
    "detach_": CutReason.DETACH,
    ".data": CutReason.DATA,
    ".data =": CutReason.DATA,
    "requires_grad_": CutReason.FROZEN,
    "tensor": CutReason.REWRAPPED,
    "as_tensor": CutReason.REWRAPPED,
    "asarray": CutReason.REWRAPPED,
    "new_tensor": CutReason.REWRAPPED,
    "scalar_tensor": CutReason.REWRAPPED,
    "__deepcopy__": CutReason.REWRAPPED,
}
_ESCAPES = {
    "item": CutReason.ITEM,
    "__float__": CutReason.ITEM,
    "__int__": CutReason.ITEM,
    "__index__": CutReason.ITEM,
    "__complex__": CutReason.ITEM,
    "tolist": CutReason.TOLIST,
    "numpy": CutReason.NUMPY,
    "__array__": CutReason.NUMPY,
}
_SHAPE_ONLY = frozenset(
    {
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "randint_like",
    }
    | {"new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"}
)
_WRAPPERS = ("Parameter(", "Tensor(", "requires_grad")
_MOST_EVENTS = 20_000


@dataclass(slots=True)
class _Event:
    """One place where values left the graph."""

    op: str
    reason: CutReason
    spot: Spot | None
    lost: int  # bits of the parameters that were live before it
    escaped: bool = False  # the value became a Python or numpy object

    def rank(self, behind_loss: bool) -> int:
        """Order events by how surely they are the cut; 3 for those that say nothing."""
        if behind_loss:
            return 1 if self.reason is CutReason.INTEGER else 0
        return 2 if self.escaped else 3


@dataclass(slots=True)
class _Use:
    """The first operation that used a parameter."""

    op: str
    spot: Spot | None


@dataclass(slots=True)
class CutLedger:
    """A bookkeeper of cuts; holds no tensor.

    Args:
        modules: names of the model's modules.
        parameters: pairs of name and parameter, frozen ones too.
    """

    modules: Modules
    parameters: Sequence[tuple[str, Tensor]]
    _names: list[str] = field(init=False)
    _bits: dict[int, tuple[weakref.ref[Tensor], int]] = field(init=False)
    _events: list[_Event] = field(default_factory=list)
    _uses: dict[int, _Use] = field(default_factory=dict)
    _cuts: TensorTable[frozenset[int]] = field(default_factory=TensorTable)
    _live: TensorTable[int] = field(default_factory=TensorTable)
    _aliases: TensorTable[bool] = field(default_factory=TensorTable)
    _memory_live: StorageTable[int] = field(default_factory=StorageTable)
    _memory_cuts: StorageTable[frozenset[int]] = field(default_factory=StorageTable)

    def __post_init__(self) -> None:
        """Number the parameters and let go of them."""
        self._names = [name for name, _ in self.parameters]
        self._bits = {id(p): (weakref.ref(p), 1 << i) for i, (_, p) in enumerate(self.parameters)}
        self.parameters = ()

    def before(self, call: Call) -> None:
        """Note the first use of parameters, and leaves that were made of tensors in a graph."""
        for tensor in call.inputs:
            bit = self._bit(tensor)
            if bit:
                if call.op not in _SHAPE_ONLY:
                    self._uses.setdefault(bit, _Use(call.op, call.spot))
            elif tensor.requires_grad and tensor.is_leaf:
                self._note_wrapped(tensor, call)

    def after(self, call: Call) -> None:
        """Note a cut if there is one, and hand on what the inputs carry to the outputs."""
        if call.op in _SHAPE_ONLY:
            return
        carried = frozenset().union(*(self._cuts_of(t) for t in call.inputs))
        live = self._live_bits(call.live)
        escape = _ESCAPES.get(call.op)
        if escape is not None:
            self._note_escape(call, escape, live, carried)
            return
        beside = carried
        if live and call.outputs:
            reason = self._reason(call)
            if reason is not None:
                carried |= {self._add(_Event(call.op, reason, call.spot, live))}
            beside = carried | self._note_indices(call, live)
        self._hand_on(call, live, carried, beside)
        if call.op in {".data", "detach"}:
            self._aliases[call.outputs[0]] = True

    def cuts_of(self, tensor: Tensor) -> frozenset[int]:
        """Return the numbers of the cuts that a tensor's value passed through."""
        return self._cuts_of(tensor)

    def explain(self, names: Collection[str], behind: Iterable[int]) -> tuple[PathCut, ...]:
        """Say for parameters that get no gradient why.

        Args:
            names: those parameters.
            behind: numbers of the cuts behind the loss, see :meth:`cuts_of`.
        """
        taints = set(behind)
        return tuple(
            self._explain(name, 1 << index, taints)
            for index, name in enumerate(self._names)
            if name in names
        )

    def frozen(self, name: str) -> PathCut:
        """Return the explanation of a frozen parameter: the line that froze it, or the first that used it."""
        bit = 1 << self._names.index(name)
        for event in self._events:
            if event.reason is CutReason.FROZEN and event.lost & bit:
                return _cut(name, CutReason.FROZEN, event.op, event.spot)
        use = self._uses.get(bit)
        if use is None:
            return PathCut(parameter=name, reason=CutReason.FROZEN, module=name.rpartition(".")[0])
        return _cut(name, CutReason.FROZEN, use.op, use.spot)

    def _explain(self, name: str, bit: int, taints: set[int]) -> PathCut:
        lost = [
            (event.rank(number in taints), number, event)
            for number, event in enumerate(self._events)
            if event.lost & bit
        ]
        rank, _, event = min(lost, default=(3, 0, None), key=lambda one: one[:2])
        if event is not None and rank < 3:
            return _cut(name, event.reason, event.op, event.spot)
        use = self._uses.get(bit)
        if use is None:
            return PathCut(parameter=name, reason=CutReason.UNUSED, module=name.rpartition(".")[0])
        return _cut(name, CutReason.NOT_IN_LOSS, use.op, use.spot)

    def _reason(self, call: Call) -> CutReason | None:
        """Return why the outputs are cut off from the live inputs; None when they are not."""
        if any(_continues(one, call) for one in call.outputs):
            return CutReason.DATA if self._writes_past_graph(call) else None
        named = _BY_NAME.get(call.op)
        mode = grad_mode_off()
        if named is not None:
            return named
        if mode is not None:
            return CutReason(mode)
        if not any(_is_number(t) for t in call.outputs):
            return CutReason.INTEGER
        return CutReason.NOT_DIFFERENTIABLE

    def _writes_past_graph(self, call: Call) -> bool:
        """Whether the target is a ``.data`` view of another tensor, which will not know its new values."""
        target = call.target
        if target is None or any(t is target for t in call.live):
            return False
        return self._aliases.get(target) is not None

    def _note_indices(self, call: Call, live: int) -> frozenset[int]:
        """An integer result beside a live one, as topk and max along a dimension give."""
        kinds = {(t.requires_grad, _is_number(t)) for t in call.outputs}
        if not kinds >= {(True, True), (False, False)}:
            return frozenset()
        return frozenset({self._add(_Event(call.op, CutReason.INTEGER, call.spot, live))})

    def _note_escape(
        self, call: Call, reason: CutReason, live: int, carried: frozenset[int]
    ) -> None:
        for number in carried:
            event = self._events[number]
            event.escaped = True
            # x.detach().numpy() is one idiom: it is the second half that matters.
            if event.reason in {CutReason.DETACH, CutReason.DATA} and event.spot == call.spot:
                event.op, event.reason = call.op, reason
        if live:
            self._add(_Event(call.op, reason, call.spot, live, escaped=True))

    def _note_wrapped(self, leaf: Tensor, call: Call) -> None:
        """A leaf in the memory of a live tensor: nn.Parameter(x), which no function mode sees."""
        if self._cuts.get(leaf) is not None:
            return
        lost = self._memory_live.get(leaf)
        cuts = self._memory_cuts.get(leaf) or frozenset()
        if lost:
            spot = last_line_with(call.spot, _WRAPPERS)
            cuts |= {self._add(_Event("Parameter", CutReason.REWRAPPED, spot, lost))}
        self._cuts[leaf] = cuts

    def _hand_on(
        self, call: Call, live: int, carried: frozenset[int], beside: frozenset[int]
    ) -> None:
        """Note what every result carries: ``carried``, and ``beside`` for integers."""
        for tensor in call.outputs:
            cuts = carried if _is_number(tensor) else beside
            if cuts:
                self._cuts[tensor] = cuts
            if call.target is tensor and carried:
                old = self._memory_cuts.get(tensor) or frozenset()
                self._memory_cuts[tensor] = old | carried
            if live and tensor.requires_grad:
                self._live[tensor] = live
                self._memory_live[tensor] = live | (self._memory_live.get(tensor) or 0)

    def _cuts_of(self, tensor: Tensor) -> frozenset[int]:
        own = self._cuts.get(tensor) or frozenset()
        return own | (self._memory_cuts.get(tensor) or frozenset())

    def _live_bits(self, tensors: Iterable[Tensor]) -> int:
        bits = 0
        for tensor in tensors:
            known = self._bit(tensor) or self._live.get(tensor)
            if known is None or not known:
                known = self._walk(tensor)
            bits |= known | (0 if tensor.is_leaf else self._memory_live.get(tensor) or 0)
        return bits

    def _walk(self, tensor: Tensor) -> int:
        """Read off the graph what a tensor of unknown origin depends on."""
        bits = 0
        for leaf in leaves_behind([tensor.grad_fn]):
            bits |= self._bits[leaf][1] if leaf in self._bits else 0
        self._live[tensor] = bits
        return bits

    def _bit(self, tensor: Tensor) -> int:
        found = self._bits.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else 0

    def _add(self, event: _Event) -> int:
        if len(self._events) >= _MOST_EVENTS:
            raise RuntimeError(
                f"noting where values leave the graph: more than {_MOST_EVENTS} places in one step; "
                "explain a smaller part"
            )
        self._events.append(event)
        return len(self._events) - 1


def _continues(output: Tensor, call: Call) -> bool:
    """Whether an output is in the graph of the inputs; a new leaf, such as a copy, begins one of its own."""
    return output.requires_grad and not (
        output.is_leaf and all(output is not one for one in call.inputs)
    )


def _is_number(tensor: Tensor) -> bool:
    """Whether a tensor can have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def _cut(name: str, reason: CutReason, op: str, spot: Spot | None) -> PathCut:
    place = describe(spot)
    return PathCut(
        parameter=name,
        reason=reason,
        op=plain_name(op),
        module=place.module,
        line=place.line,
        source=place.source,
    )

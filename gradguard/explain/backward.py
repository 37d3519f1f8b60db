"""Listens to every node of a graph while it is differentiated, and reads what they did to gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node

from gradguard.explain.births import BirthLedger
from gradguard.explain.graph import leaf_of, nodes_behind, operation_name
from gradguard.explain.places import Place, describe
from gradguard.explain.readings import FlagRoll, Flags
from gradguard.explain.results import DeadGradient, NonfiniteOrigin


@dataclass(frozen=True, slots=True)
class _Edge:
    """One input of a node: the flags of its gradient, and the parameters behind it (bits)."""

    flags: int
    behind: int


@dataclass(frozen=True, slots=True)
class _Ran:
    """A node that was run, in order."""

    op: str
    call: int | None
    incoming: tuple[int, ...]
    outgoing: tuple[_Edge, ...]


class BackwardLedger:
    """What every node got and gave; holds no tensor but flags.

    Args:
        births: where the nodes were made.
        parameters: pairs of name and parameter.
    """

    def __init__(self, births: BirthLedger, parameters: Sequence[tuple[str, Tensor]]) -> None:
        self.fault: Exception | None = None
        self._births = births
        self._names = [name for name, _ in parameters]
        self._bits = {id(p): 1 << i for i, (_, p) in enumerate(parameters)}
        self._roll = FlagRoll()
        self._ran: list[_Ran] = []

    @contextmanager
    def listening(self, roots: Sequence[Tensor]) -> Iterator[None]:
        """Hook every node behind ``roots``; the hooks go when the block ends."""
        with ExitStack() as handles:
            nodes = list(nodes_behind(root.grad_fn for root in roots))
            behind = self._parameters_behind(nodes)
            for node in nodes:
                if leaf_of(node) is None:
                    edges = tuple(_bits_of(behind, follower) for follower, _ in node.next_functions)
                    call = self._births.call_of(node)
                    hook = _NodeHook(self, operation_name(node), call, edges)
                    handles.callback(node.register_hook(hook).remove)
            yield

    def nonfinite(self) -> NonfiniteOrigin | None:
        """Return the first node that made NaN or Inf of finite gradients; None for none. Sync: yes.

        When the cause is a value of the forward pass that was not finite (0 * inf), that value's birth is
        returned.
        """
        flags = self._roll.read()
        for ran in self._ran:
            bad = [flags[edge.flags] for edge in ran.outgoing if flags[edge.flags].bad]
            if not bad or any(flags[i].bad for i in ran.incoming):
                continue
            earlier = None if ran.call is None else self._births.origin_of_call(ran.call)
            if earlier is not None:
                return earlier
            value = "nan" if any(one.nan for one in bad) else "inf"
            place = self._place(ran)
            return NonfiniteOrigin(op=ran.op, phase="backward", value=value, **place._asdict())
        return None

    def dead(self, zero: set[str]) -> tuple[DeadGradient, ...]:
        """Return the nodes that turned a gradient into exact zeros. Sync: yes.

        Args:
            zero: names of the parameters whose gradient is zero; no other is reported.
        """
        flags = self._roll.read()
        wanted = sum(1 << i for i, name in enumerate(self._names) if name in zero)
        found: dict[tuple[str, Place], int] = {}
        for ran in self._ran:
            lost = self._lost(ran, flags) & wanted
            if lost:
                key = ran.op, self._place(ran)
                found[key] = found.get(key, 0) | lost
        return tuple(
            DeadGradient(op=op, parameters=self._named(bits), **place._asdict())
            for (op, place), bits in found.items()
        )

    def _lost(self, ran: _Ran, flags: list[Flags]) -> int:
        """Return the parameters behind the inputs to which a node passed on zeros only."""
        if not any(flags[i].nonzero for i in ran.incoming):
            return 0
        lost = 0
        for edge in ran.outgoing:
            lost |= 0 if flags[edge.flags].nonzero else edge.behind
        return lost

    def note(
        self,
        hook: _NodeHook,
        outgoing: Sequence[Tensor | None],
        incoming: Sequence[Tensor | None],
    ) -> None:
        """Note what a node got and gave; a fault is kept and ends the noting, not the backward pass."""
        if self.fault is not None:
            return
        try:
            take = self._roll.take
            edges = zip(hook.edges, outgoing, strict=False)  # a custom Function may give more
            ran = _Ran(
                hook.op,
                hook.call,
                tuple(take(t) for t in incoming if t is not None),
                tuple(_Edge(take(t), behind) for behind, t in edges if t is not None),
            )
            self._ran.append(ran)
        except Exception as error:  # noqa: BLE001 (the boundary to the user's backward pass)
            self.fault = error.with_traceback(None)

    def _place(self, ran: _Ran) -> Place:
        return describe(None if ran.call is None else self._births.calls[ran.call].spot)

    def _named(self, bits: int) -> tuple[str, ...]:
        return tuple(name for i, name in enumerate(self._names) if bits >> i & 1)

    def _parameters_behind(self, nodes: Sequence[Node]) -> Mapping[Node, int]:
        """Return the parameters behind every node."""
        behind: dict[Node, int] = {}
        for node in _inputs_first(nodes):
            leaf = leaf_of(node)
            bits = 0 if leaf is None else self._bits.get(id(leaf), 0)
            for follower, _ in node.next_functions:
                bits |= _bits_of(behind, follower)
            behind[node] = bits
        return behind


class _NodeHook:
    """A hook of one node; it knows the ledger and neither the node nor a tensor."""

    __slots__ = ("_ledger", "call", "edges", "op")

    def __init__(
        self,
        ledger: BackwardLedger,
        op: str,
        call: int | None,
        edges: tuple[int, ...],
    ) -> None:
        self._ledger = ledger
        self.op = op
        self.call = call
        self.edges = edges

    def __call__(
        self, grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]
    ) -> None:
        """Note both sides; torch calls "inputs" what goes on towards the leaves."""
        self._ledger.note(self, grad_inputs, grad_outputs)


def _bits_of(behind: Mapping[Node, int], node: Node | None) -> int:
    return 0 if node is None else behind.get(node, 0)


def _inputs_first(nodes: Sequence[Node]) -> Iterator[Node]:
    """Yield the nodes so that everything behind a node comes before it."""
    done: set[Node] = set()
    for start in nodes:
        stack = [start]
        while stack:
            node = stack[-1]
            if node in done:
                stack.pop()
                continue
            waiting = [f for f, _ in node.next_functions if f is not None and f not in done]
            if waiting:
                stack += waiting
            else:
                done.add(node)
                yield stack.pop()

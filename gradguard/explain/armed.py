"""Probes that listen to one training step as it happens: no second forward pass, nothing run twice."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.overrides import _get_current_function_mode

from gradguard.compiled import is_compiled
from gradguard.explain.backward import BackwardLedger
from gradguard.explain.births import BirthLedger, Value
from gradguard.explain.cuts import CutLedger
from gradguard.explain.places import Modules
from gradguard.explain.results import DeadGradient, NonfiniteOrigin, PathCut, as_facts
from gradguard.explain.tracing import Tracer
from gradguard.facts import ProbeReading
from gradguard.norms import tensor_norms


class ArmedProbes:
    """Listens to the user's own forward and backward passes of one step, then says what it saw.

    The step computes the same numbers, but slower (two to five times). Operations of the main thread are
    seen; what a compiled region, a custom Function or a checkpoint does inside is not. In evaluation mode
    torch leaves its fused transformer path while probes are armed.

    Args:
        model: kept by weak reference.
        parameters: pairs of name and parameter to report on; kept by weak reference.
        step: number of the optimizer step under way, for the readings.

    Memory: a few bytes per operation of the step; no tensor of the step is kept alive.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[tuple[str, Tensor]], step: int
    ) -> None:
        self._model = weakref.ref(model)
        self._parameters = [(name, weakref.ref(p)) for name, p in parameters]
        self._step = step
        self._tracer: Tracer | None = None
        self._cuts: CutLedger | None = None
        self._births: BirthLedger | None = None
        self._backwards: list[BackwardLedger] = []
        self._behind_losses: frozenset[int] = frozenset()
        self._losses: list[Value] = []

    def start(self) -> bool:
        """Begin to listen; return False where that is not possible.

        Not possible: another function mode is active (``torch.set_default_device`` is one), a compiled
        model, inside of a compiled region, without the model, or when started before. Sync: none.
        """
        model = self._model()
        busy = self._tracer is not None or _len_torch_function_stack() > 0
        if model is None or busy or torch.compiler.is_compiling() or is_compiled(model):
            return False
        named = self._named()
        modules = Modules(model)
        self._cuts, self._births = CutLedger(modules, named), BirthLedger(named)
        self._tracer = Tracer(modules, [self._cuts, self._births], self._around_backward)
        self._tracer.__enter__()  # type: ignore[no-untyped-call]
        return True

    def stop(self) -> tuple[ProbeReading, ...]:
        """Stop listening and return what was found; call it before gradients are cleared.

        A second call, or one without :meth:`start`, returns nothing. Sync: reads values on the host.

        Raises:
            Exception: the one that ended the listening early, if any; the user's step was not touched.
        """
        tracer = self._tracer
        if tracer is None:
            return ()
        fault = tracer.fault
        tracer.stop()
        top = _get_current_function_mode()  # type: ignore[no-untyped-call]
        if top is tracer:  # otherwise a mode that was entered since then lies above
            tracer.__exit__(None, None, None)
            self._tracer = None
        try:
            if fault is not None:
                raise fault
            return self._findings()
        finally:
            self._forget()

    def _findings(self) -> tuple[ProbeReading, ...]:
        if self._cuts is None or self._births is None:
            return ()
        missing, zero = self._without_gradient()
        results: list[PathCut | NonfiniteOrigin | DeadGradient] = []
        results += self._cuts.explain(missing, self._behind_losses)
        origins = [self._births.origin(loss) for loss in self._losses]
        for ledger in self._backwards:
            if ledger.fault is not None:
                raise ledger.fault
            origins.append(ledger.nonfinite())
            results += ledger.dead(zero)
        results += [one for one in origins if one is not None][:1]
        return as_facts(self._step, dict.fromkeys(results))

    @contextmanager
    def _around_backward(self, roots: Sequence[Tensor]) -> Iterator[None]:
        """Hook the graph of one backward pass while it runs."""
        cuts, births = self._cuts, self._births
        if cuts is None or births is None:  # stopped already
            yield
            return
        for root in roots:
            self._behind_losses |= cuts.cuts_of(root)
            self._losses.append(births.look(root))
        ledger = BackwardLedger(births, self._named())
        self._backwards.append(ledger)
        with ledger.listening(roots):
            yield

    def _named(self) -> list[tuple[str, Tensor]]:
        found = [(name, reference()) for name, reference in self._parameters]
        return [(name, p) for name, p in found if p is not None]

    def _without_gradient(self) -> tuple[set[str], set[str]]:
        """Return the names of trainable parameters without a gradient, and of those where it is zero.

        Both are empty when nothing was differentiated: then no gradient is no fault.
        """
        named = [(name, p) for name, p in self._named() if p.requires_grad]
        present = {name: p.grad for name, p in named if p.grad is not None}
        sums = tensor_norms(list(present.values()), order=1).tolist()
        zero = {name for name, total in zip(present, sums, strict=True) if total == 0.0}
        return {name for name, _ in named} - present.keys() if present else set(), zero

    def _forget(self) -> None:
        self._cuts = self._births = None
        self._backwards, self._losses = [], []
        self._behind_losses = frozenset()
        self._parameters = []

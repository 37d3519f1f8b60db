"""Step or skip: a gate that can veto the optimizer steps of any ``torch.optim`` optimizer, and says why.

It uses step hooks only. ``scaler.step()``, ``scaler.update()``, gradient accumulation and learning-rate
schedulers go on as they are, and a vetoed step is a bit-exact no-op on parameters and optimizer state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch.distributed as dist
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from gradguard.decision_table import DecisionTable, Judgement, Verdict
from gradguard.deferred import DeferredRows
from gradguard.policies import AnySignal, Finite, Policy
from gradguard.readings import Readings, agreed, read_step, recounted
from gradguard.records import GateDecision
from gradguard.scaler import innermost_optimizer
from gradguard.verdicts import GateCounts, VerdictBook
from gradguard.vetoes import (
    FoundInfFlag,
    HiddenGradients,
    is_fused,
    is_outermost_step,
    would_create_state,
)

Backend = Literal["auto", "hide", "device"]


class StepGate:
    """Judges every attempted step of one optimizer and vetoes the ones its policies object to.

    ``StepGate(optimizer)`` is all there is to do; ``detach()``, or leaving the ``with`` block, removes it.
    Two back ends carry the same policies out:

    - *hide* (any optimizer): gradients are hidden during a vetoed step. Needs one host read per step.
    - *device* (fused Adam, AdamW, SGD, Adagrad): the verdict stays on the device in
      ``optimizer.found_inf``. No host read per step; decisions, counts and ceilings come a few steps late.
      A step that creates optimizer state, the first above all, still goes through *hide*.

    Args:
        optimizer: a ``torch.optim.Optimizer`` or a wrapper that holds one as ``.optimizer``.
        policies: reasons to veto, see :mod:`gradguard.policies`; read in this order, NaN and Inf first.
        backend: ``"auto"`` is *device* for a fused optimizer and *hide* for all others.
        max_consecutive: vetoes in a row that are accepted; one more raises.
        max_veto_rate: share of vetoes accepted among ``rate_window`` steps; more raise.
        rate_window: number of judged steps the rate looks back.
        lag: steps whose decisions the device back end collects before it reads them.
        process_group: ranks that must agree; the default group when torch.distributed is initialised.
            Readings are combined by one MAX all-reduce, so every rank must attempt the same steps.

    Raises:
        TypeError: no optimizer, an LBFGS optimizer, or something else than policies.
        ValueError: an option out of range, or the device back end for an optimizer that is not fused.
        GateCeilingError: from ``optimizer.step()``, with gradients and weights as they were before it.
        RuntimeError: from ``optimizer.step(closure)``, which no gate can judge.

    Sync: one host read per step for *hide* (two on a step with a non-finite norm), none for *device*.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        policies: Sequence[Policy] = (Finite(), AnySignal()),
        *,
        backend: Backend = "auto",
        max_consecutive: int = 10,
        max_veto_rate: float = 0.5,
        rate_window: int = 100,
        lag: int = 8,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._optimizer = _check_optimizer(optimizer, backend)
        self._table = DecisionTable(_check_policies(policies))
        self._states: tuple[Tensor, ...] | None = None
        self._remembered: list[list[float]] | None = None  # loaded, until a step tells the device
        self._backend, self._process_group = backend, process_group
        self._book = VerdictBook(
            self._table.policies,
            max_consecutive=max_consecutive,
            max_veto_rate=max_veto_rate,
            rate_window=rate_window,
        )
        if lag < 1:
            raise ValueError(f"StepGate got lag={lag!r}; expected at least 1 step")
        self._late = DeferredRows(self._enter, lag=lag, max_age_s=10.0)
        self._hidden, self._flag = HiddenGradients(), FoundInfFlag()
        self._loss: Tensor | float | None = None
        self._veto_flag: Tensor | None = None
        self._attempts, self._warned = 0, False
        self._handles = (
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        )

    def observe(self, *, loss: Tensor | float) -> None:
        """Tell the loss of the coming step; the last call before the step counts.

        With accumulation, tell the loss of the whole window. Sync: none.

        Raises:
            ValueError: ``loss`` has more than one element.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f"StepGate.observe: expected a loss with one element, got shape {tuple(loss.shape)}; "
                    "reduce it first, for example with .mean()"
                )
            loss = loss.detach().reshape(()).clone()  # the loop may go on to divide it in place
        self._loss = loss

    # --- what is known --------------------------------------------------------------------------

    @property
    def attempts(self) -> int:
        """Number of attempted steps so far; the next one is judged as number ``attempts``."""
        return self._attempts

    @property
    def last_decision(self) -> GateDecision | None:
        """The newest decision that is known; on the device back end a few steps old."""
        return self._book.last

    @property
    def decisions(self) -> tuple[GateDecision, ...]:
        """The newest decisions that are known (1,000 at most), oldest first."""
        return self._book.decisions

    def decision(self, attempt: int) -> GateDecision | None:
        """Return the decision about one attempt, or None if it is not known yet or no longer kept."""
        return self._book.decision(attempt)

    @property
    def counts(self) -> GateCounts:
        """How often the gate said what; attempts that are not read yet are in ``unread``."""
        return self._book.counts(self._attempts)

    @property
    def is_hiding(self) -> bool:
        """Whether gradients are hidden right now, between this gate's pre-hook and post-hook."""
        return bool(self._hidden)

    def hidden_gradients(self) -> Mapping[int, Tensor]:
        """Return the gradients hidden right now by ``id(parameter)``."""
        return self._hidden.by_id()

    @property
    def veto_flag(self) -> Tensor | None:
        """The verdict on the current step as a 0-dim tensor, 1 for a veto; None on the hide back end.

        Valid from this gate's pre-hook until its next one.
        """
        return self._veto_flag

    # --- save and go on -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later verdicts depend on, as plain values: a gate that loads it goes on alike.

        Running estimates of the policies, vetoes the ceilings look back on, and counts. The decisions
        themselves are not part of it.

        Sync: waits for the device.
        """
        self._late.flush()
        states = self._remembered
        if self._states is not None:
            states = [state.tolist() for state in self._states]
        policies = [policy.name for policy in self._table.policies]
        book = self._book.state_dict()
        return {"policies": policies, "states": states, "attempts": self._attempts, "book": book}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` of a gate with the same policies returned.

        Decisions that were made before are not known to this gate.

        Raises:
            ValueError: the state is of a gate with other policies.

        Sync: waits for the device.
        """
        policies = [policy.name for policy in self._table.policies]
        if state["policies"] != policies:
            raise ValueError(
                f"StepGate.load_state_dict got the state of a gate with the policies {state['policies']}, "
                f"this one has {policies}; make it with the same policies in the same order"
            )
        self._late.flush()
        self._states, self._remembered = None, state["states"]
        self._attempts = state["attempts"]
        self._book.load_state_dict(state["book"])

    # --- life cycle -----------------------------------------------------------------------------

    def flush(self) -> None:
        """Read every decision the device back end has not read yet.

        Raises:
            GateCeilingError: they pass a ceiling.

        Sync: waits for the device.
        """
        self._late.flush()
        self._book.raise_if_ceiling_passed()

    def detach(self) -> None:
        """Remove the hooks and put everything back. Safe to call twice. Sync: waits for the device."""
        for handle in self._handles:
            handle.remove()
        self.restore()
        self._late.flush()

    def restore(self) -> None:
        """Bring hidden gradients back after a step that raised, before going on without a new backward."""
        self._hidden.restore()
        self._flag.take_down(self._optimizer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()
        if exc is None:
            self._book.raise_if_ceiling_passed()

    # --- one step -------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        if not is_outermost_step(optimizer):
            return
        self.restore()
        _refuse_closure(args, kwargs)
        self._late.poll()
        self._book.raise_if_ceiling_passed()
        parameters = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        readings = self._read(parameters)
        self._attempts += 1
        if self._decides_on_device():
            self._veto_on_device(readings, parameters)
        else:
            self._veto_by_hiding(readings, parameters)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if is_outermost_step(optimizer):
            self.restore()

    def _decides_on_device(self) -> bool:
        wanted = self._backend != "hide" and is_fused(self._optimizer)
        return wanted and not would_create_state(self._optimizer)

    def _read(self, parameters: Sequence[Tensor]) -> Readings[Tensor]:
        loss, self._loss = self._loss, None
        if parameters and loss is None:
            self._warn_that_policies_abstain()
        return read_step(self._optimizer, parameters, loss=loss)

    def _veto_on_device(self, local: Readings[Tensor], parameters: Sequence[Tensor]) -> None:
        judgement = self._judge(local)
        self._veto_flag = judgement.vetoed.float()
        self._late.push(parameters, (judgement.packed,))
        self._flag.put_up(self._optimizer, self._veto_flag)

    def _veto_by_hiding(self, local: Readings[Tensor], parameters: Sequence[Tensor]) -> None:
        self._veto_flag = None
        self._late.flush()  # decisions stay in order
        verdict = self._verdict_on_host(local, parameters)
        self._book.enter(verdict, self._optimizer, parameters)
        self._book.raise_if_ceiling_passed()
        # A fused step that the scaler skips still creates state, some of it uninitialised.
        if verdict.readings.scaler_skips or not verdict.decision.allowed:
            self._hidden.hide(parameters)

    def _verdict_on_host(self, local: Readings[Tensor], parameters: Sequence[Tensor]) -> Verdict:
        before = self._states
        verdict = self._table.verdict(self._judge(local).packed.tolist())
        if verdict.judged and verdict.readings.nonfinite_tensors > 0:
            # A norm can overflow although every entry is finite: count, on this step only.
            self._states = before
            exact = recounted(local, self._optimizer, parameters)
            verdict = self._table.verdict(self._judge(exact).packed.tolist())
        return verdict

    def _judge(self, local: Readings[Tensor]) -> Judgement:
        """Judge what all ranks read together, and learn from it if the step is allowed."""
        readings = agreed(local, self._process_group)
        if self._states is None:
            self._states = self._table.start(like=readings.norm, values=self._remembered)
        judgement = self._table.judge(readings, self._states)
        self._states = self._table.learn(readings, self._states, judgement.allowed)
        return judgement

    def _enter(self, parameters: Sequence[Tensor], values: list[float]) -> None:
        self._book.enter(self._table.verdict(values), self._optimizer, parameters)

    def _warn_that_policies_abstain(self) -> None:
        blind = [policy.name for policy in self._table.policies if policy.judges_loss]
        if blind and not self._warned:
            self._warned = True
            warnings.warn(
                f"{', '.join(blind)} has no loss to judge and abstains; call gate.observe(loss=loss) "
                "before every optimizer step (said once; gate.counts.abstained counts)",
                UserWarning,
                stacklevel=2,
            )


def _check_optimizer(optimizer: object, backend: str) -> Optimizer:
    inner = innermost_optimizer(optimizer)
    if isinstance(inner, LBFGS):
        raise TypeError(
            "StepGate got an LBFGS optimizer: its gradients come from the closure, inside the step, when "
            "the gate has already decided; put the check into the closure instead"
        )
    if backend not in get_args(Backend):
        raise ValueError(f"StepGate got backend={backend!r}; expected one of {get_args(Backend)}")
    if backend == "device" and not is_fused(inner):
        raise ValueError(
            f"StepGate(backend='device') needs an optimizer made with fused=True, got "
            f"{type(inner).__name__} without it; use backend='auto'"
        )
    return inner


def _check_policies(policies: Sequence[Policy]) -> Sequence[Policy]:
    if not policies or not all(isinstance(policy, Policy) for policy in policies):
        raise TypeError(
            f"StepGate got policies={policies!r}; expected one or more policies, "
            "for example (Finite(), AnySignal())"
        )
    return policies


def _refuse_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("closure") is not None or any(callable(value) for value in args[1:]):
        raise RuntimeError(
            "StepGate cannot judge optimizer.step(closure): the closure makes the gradients inside the "
            "step, after the decision; run it before a plain optimizer.step(), or detach() the gate"
        )

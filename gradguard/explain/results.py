"""What the explanations say: plain values, one sentence each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from gradguard.facts import ProbeReading


class CutReason(StrEnum):
    """Why no gradient can reach a parameter."""

    DETACH = "detach"
    DATA = ".data"
    NO_GRAD = "no_grad"
    INFERENCE_MODE = "inference_mode"
    ITEM = "item"
    TOLIST = "tolist"
    NUMPY = "numpy"
    INTEGER = "integer result"
    REWRAPPED = "re-wrapped tensor"
    NOT_DIFFERENTIABLE = "not differentiable"
    FROZEN = "frozen"
    NOT_IN_LOSS = "not in the loss"
    UNUSED = "unused"


_HOW = {
    CutReason.DETACH: "is cut off by detach()",
    CutReason.DATA: "is cut off by .data",
    CutReason.NO_GRAD: "is used under torch.no_grad()",
    CutReason.INFERENCE_MODE: "is used under torch.inference_mode()",
    CutReason.ITEM: "leaves the graph as a Python number",
    CutReason.TOLIST: "leaves the graph through tolist()",
    CutReason.NUMPY: "leaves the graph through numpy",
    CutReason.INTEGER: "is lost in an integer result",
    CutReason.REWRAPPED: "is copied into a new tensor",
    CutReason.NOT_DIFFERENTIABLE: "is lost in an operation without a derivative",
    CutReason.FROZEN: "is frozen (requires_grad is False)",
    CutReason.NOT_IN_LOSS: "is used, but nothing made of it is in the loss",
    CutReason.UNUSED: "is not used in the forward pass",
}
_SAY_ALL = {CutReason.DETACH, CutReason.DATA, CutReason.ITEM, CutReason.TOLIST, CutReason.NUMPY}
"""Reasons whose words name the operation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathCut:
    """Why a parameter gets no gradient.

    Attributes:
        parameter: its name.
        reason: what kind of cut it is.
        op: the operation that cut the path; the first that used the parameter for "not in the loss" and
            "frozen"; None for none.
        module: dotted path of the module being called there, "" for the model; None outside of it. For a
            parameter that was not used, the module that owns it.
        line: ``"file.py:48"`` of the user's code; None where there is none.
        source: text of that line.
    """

    parameter: str
    reason: CutReason
    op: str | None = None
    module: str | None = None
    line: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        """Return one sentence."""
        op = None if self.reason in _SAY_ALL else self.op
        return f"{self.parameter} {_HOW[self.reason]}{_at(op, self.line, self.source)}."


@dataclass(frozen=True, slots=True, kw_only=True)
class NonfiniteOrigin:
    """The operation that made the first NaN or Inf.

    Attributes:
        op: its name; for a value that was not finite before the forward pass, the first operation to use it.
        phase: ``"forward"`` or ``"backward"`` (then it is the operation's derivative).
        value: ``"nan"`` or ``"inf"``.
        module, line, source: as in :class:`PathCut`.
        entered: None when the operation made the value; else what brought it in: name of a parameter or
            ``"input"``.
    """

    op: str
    phase: str
    value: str
    module: str | None = None
    line: str | None = None
    source: str | None = None
    entered: str | None = None

    def __str__(self) -> str:
        """Return one sentence."""
        at = _at(None, self.line, self.source)
        if self.entered is not None:
            return f"{self.value} came in with {self.entered}, which {self.op} uses{at}."
        what = "the derivative of " if self.phase == "backward" else ""
        return f"{self.value} is born in {what}{self.op}{at}."


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadGradient:
    """An operation that got a gradient and passed on exact zeros.

    Attributes:
        op: its name.
        parameters: names of the parameters behind it whose gradient is exactly zero.
        module, line, source: as in :class:`PathCut`.
    """

    op: str
    parameters: tuple[str, ...]
    module: str | None = None
    line: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        """Return one sentence."""
        few = ", ".join(self.parameters[:4]) + (", ..." if len(self.parameters) > 4 else "")
        return (
            f"the gradient of {few} becomes zero in {self.op}{_at(None, self.line, self.source)}."
        )


def _at(op: str | None, line: str | None, source: str | None) -> str:
    what = f", in {op}" if op else ""
    place = f" at {line}" if line else ""
    return f"{what}{place}: `{source}`" if source else f"{what}{place}"


def as_facts(
    step: int, results: Iterable[PathCut | NonfiniteOrigin | DeadGradient]
) -> tuple[ProbeReading, ...]:
    """Return what the explanations say as readings for the rules, one per parameter.

    Args:
        step: number of the optimizer step they belong to.
        results: of :func:`explain_paths`, :func:`locate_nonfinite`, :func:`locate_dead`.
    """
    return tuple(fact for one in results for fact in _facts(step, one))


def _facts(step: int, one: PathCut | NonfiniteOrigin | DeadGradient) -> list[ProbeReading]:
    names: tuple[str | None, ...]
    if isinstance(one, PathCut):
        kind, names, reason, phase = "cut", (one.parameter,), str(one.reason), "forward"
    elif isinstance(one, NonfiniteOrigin):
        entered = None if one.entered == "input" else one.entered
        kind, names, reason, phase = "nonfinite", (entered,), one.value, one.phase
    else:
        kind, names, reason, phase = "dead", one.parameters, "zero derivative", "backward"
    return [
        ProbeReading(
            step=step,
            kind=kind,
            parameter=name,
            op=one.op,
            reason=reason,
            module=one.module,
            line=one.line,
            source=one.source,
            phase=phase,
        )
        for name in names
    ]

"""What a step gate may object to: policies, each a few rows of a decision table over the readings of a step.

Everything is tensor arithmetic without a host read, so that the same rows decide on the host and on the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradguard.readings import Readings


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a decision table.

    Attributes:
        holds: readings and the policy's state to a 0-dim bool tensor. Must not read on the host.
        reason: the same values, on the host, to a sentence.
        on_nonfinite: the row is about NaN or Inf; such rows are read before all others.
    """

    holds: Callable[[Readings[Tensor], Tensor], Tensor]
    reason: Callable[[Readings[float], Tensor], str]
    on_nonfinite: bool = False


class Policy(ABC):
    """One reason to veto an optimizer step. Subclass it for your own; keep it a frozen value.

    What a policy remembers is a vector on the device that the gate keeps for it: :meth:`start` gives
    the first one, :meth:`learn` the next one, and the gate takes that over after allowed steps only.
    """

    judges_loss: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name that decisions and counts show."""
        return type(self).__name__

    @abstractmethod
    def table(self) -> tuple[Row, ...]:
        """Return the rows; the step is vetoed when any of them holds."""

    def start(self) -> tuple[float, ...]:
        """Return the state before the first step."""
        return ()

    def learn(self, readings: Readings[Tensor], state: Tensor) -> Tensor:  # noqa: ARG002
        """Return the state after a step that was allowed. Must not read on the host."""
        return state


@dataclass(frozen=True)
class Finite(Policy):
    """Vetoes a step with NaN or Inf in a gradient.

    Gradients whose *norm* overflows although every entry is finite (in float32 from about 1.8e19 on) are
    allowed on the hide back end, which counts exactly on such a step. The device back end cannot tell the two
    apart without a second pass over all gradients, and vetoes.
    """

    def table(self) -> tuple[Row, ...]:
        """One row: a gradient with NaN or Inf."""
        return (
            Row(
                lambda r, _: r.nonfinite_tensors > 0,
                lambda r, _: _holders(int(r.nonfinite_tensors)),
                on_nonfinite=True,
            ),
        )


@dataclass(frozen=True)
class AnySignal(Policy):
    """Vetoes a step on which no gradient says anything: with weight decay or momentum it would still move.

    Judged over all parameter groups together: one group with zero gradient is no reason to skip.

    Args:
        threshold: the global gradient norm must be above it. Below 1e-18 a float32 norm cannot
            tell small from zero, so smaller thresholds are refused.
    """

    threshold: float = 1e-12

    def __post_init__(self) -> None:
        _require(
            1e-18 <= self.threshold < math.inf,
            f"AnySignal(threshold={self.threshold!r}): expected a finite number of at least 1e-18 "
            "(squares of smaller gradients are zero in float32)",
        )

    def table(self) -> tuple[Row, ...]:
        """One row: the norm is not above the threshold."""
        return (
            Row(
                lambda r, _: r.norm <= self.threshold,
                lambda r, _: (
                    f"gradient norm {r.norm:.4g} over all groups is not above {self.threshold:g}"
                ),
            ),
        )


@dataclass(frozen=True)
class _Spike(Policy):
    """Vetoes a value far above its own running mean; see :class:`NormSpike` for the options."""

    k: float = 6.0
    window: int = 100
    warmup: int = 20
    floor: float = 0.1

    def __post_init__(self) -> None:
        where = f"{self.name}(k={self.k!r}, window={self.window!r}, warmup={self.warmup!r}, "
        where += f"floor={self.floor!r}): expected "
        _require(0 < self.k < math.inf, where + "a finite k above 0")
        _require(self.window >= 2, where + "a window of at least 2 steps")
        _require(self.warmup >= 1, where + "a warmup of at least 1 step")
        _require(0 <= self.floor < math.inf, where + "a finite floor of at least 0")

    def start(self) -> tuple[float, ...]:
        """Count, mean and variance of no value yet."""
        return (0.0, 0.0, 0.0)

    def limit(self, state: Tensor) -> Tensor:
        """Return mean + k * deviation; Inf while fewer than ``warmup`` steps were seen."""
        count, mean, variance = state.unbind()
        deviation = torch.maximum(variance.sqrt(), self.floor * mean.abs())
        return torch.where(count < self.warmup, math.inf, mean + self.k * deviation)

    def _explain(self, what: str, value: float, state: Tensor) -> str:
        return (
            f"{what} {value:.4g} is above {float(self.limit(state)):.4g} "
            f"(k={self.k:g} deviations over its running mean {float(state[1]):.4g})"
        )


@dataclass(frozen=True)
class NormSpike(_Spike):
    """Vetoes a gradient norm far above its running mean, or one that is not finite.

    The limit is ``mean + k * max(standard deviation, floor * |mean|)``, both exponential averages
    over about ``window`` allowed steps. A lasting rise of the norm (a new learning rate, say) is
    vetoed until a ceiling of the gate raises: the gate does not guess that it was meant.

    Args:
        k: deviations above the mean that are still fine.
        window: steps the averages reach back.
        warmup: allowed steps before the first veto for a finite value.
        floor: smallest deviation, relative to the mean; keeps a steady value from vetoing its own rounding.
    """

    def table(self) -> tuple[Row, ...]:
        """Two rows: not finite, above the limit."""
        return (
            Row(
                lambda r, _: ~r.norm.isfinite(),
                lambda r, _: f"gradient norm is {r.norm}",
                on_nonfinite=True,
            ),
            Row(
                lambda r, s: r.norm > self.limit(s),
                lambda r, s: self._explain("gradient norm", r.norm, s),
            ),
        )

    def learn(self, readings: Readings[Tensor], state: Tensor) -> Tensor:
        """Take the norm into the running mean and deviation."""
        return running_estimate(state, readings.norm, window=self.window)


@dataclass(frozen=True)
class LossSpike(_Spike):
    """Vetoes a loss far above its running mean, or one that is not finite.

    The loss of the coming step is told by ``gate.observe(loss=loss)``; without it this policy
    abstains, and ``gate.counts.abstained`` says how often. Options as for :class:`NormSpike`; losses
    may be negative.
    """

    judges_loss: ClassVar[bool] = True

    def table(self) -> tuple[Row, ...]:
        """Two rows: not finite, above the limit; none holds without a loss."""
        return (
            Row(
                lambda r, _: (r.has_loss > 0) & ~r.loss.isfinite(),
                lambda r, _: f"loss is {r.loss}",
                on_nonfinite=True,
            ),
            Row(
                lambda r, s: (r.has_loss > 0) & (r.loss > self.limit(s)),
                lambda r, s: self._explain("loss", r.loss, s),
            ),
        )

    def learn(self, readings: Readings[Tensor], state: Tensor) -> Tensor:
        """Take the loss, if there is one, into the running mean and deviation."""
        learned = running_estimate(state, readings.loss, window=self.window)
        return torch.where(readings.has_loss > 0, learned, state)


def running_estimate(state: Tensor, value: Tensor, *, window: int) -> Tensor:
    """Return ``(count, mean, variance)`` after one more value; unchanged where that would not be finite.

    A plain mean and (population) variance until ``window`` values were seen, then exponential ones
    with weight ``1 / window``. Sync: none.

    Source: T. Finch, "Incremental calculation of weighted mean and variance" (2009), section 9.
    """
    count, mean, variance = state.unbind()
    count = count + 1
    weight = (1 / count).clamp(min=1 / window)
    delta = value - mean
    learned = torch.stack(
        (count, mean + weight * delta, (1 - weight) * (variance + weight * delta * delta))
    )
    return torch.where(learned.isfinite().all(), learned, state)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _holders(count: int) -> str:
    return "1 gradient holds NaN or Inf" if count == 1 else f"{count} gradients hold NaN or Inf"

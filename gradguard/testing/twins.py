"""Small real training loops that the properties run twice: with the code under test and without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop

from gradguard.testing.neutrality import fingerprint_parts
from gradguard.testing.strategies import OverflowSequence

Place = Literal[
    "before unscale_()",
    "before step() without unscale_()",
    "between unscale_() and step()",
    "after step()",
]
"""Where in the loop a sanitizer is called."""

PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Whether the scaler took a step, and how far its largest weight moved."""

    taken: bool
    moved: float


@dataclass(slots=True, kw_only=True)
class ScalerTrainer:
    """One weight vector under ``SGD(lr=1)`` and a real GradScaler on the CPU."""

    weight: nn.Parameter
    optimizer: Optimizer
    scaler: GradScaler
    sanitizer: Callable[..., object] | None
    with_scaler: bool
    _steps_taken: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Count the steps that are taken: a skipped one does not reach an unfused optimizer."""
        self.optimizer.register_step_post_hook(lambda *_: self._count())

    @classmethod
    def of(
        cls,
        sequence: OverflowSequence,
        *,
        sanitizer: Callable[..., object] | None = None,
        with_scaler: bool = False,
    ) -> ScalerTrainer:
        """Return a fresh trainer at the sequence's loss scale."""
        weight = nn.Parameter(torch.zeros(len(sequence.steps[0])))
        scaler = GradScaler(
            "cpu", init_scale=sequence.loss_scale, growth_interval=sequence.growth_interval
        )
        optimizer = SGD([weight], lr=1.0, fused=False)
        return cls(
            weight=weight,
            optimizer=optimizer,
            scaler=scaler,
            sanitizer=sanitizer,
            with_scaler=with_scaler,
        )

    def step(self, scaled_gradient: Sequence[float], place: Place = PLACES[0]) -> StepResult:
        """Do one training step whose backward pass leaves ``scaled_gradient`` in ``.grad``."""
        before, steps_before = self.weight.detach().clone(), self._steps_taken
        self.optimizer.zero_grad()
        gradient = torch.tensor(scaled_gradient) / self.scaler.get_scale()
        self.scaler.scale((self.weight * gradient).sum()).backward()  # type: ignore[no-untyped-call]
        self._sanitize(place in ("before unscale_()", "before step() without unscale_()"))
        if place != "before step() without unscale_()":
            self.scaler.unscale_(self.optimizer)
        self._sanitize(place == "between unscale_() and step()")
        self.scaler.step(self.optimizer)
        self._sanitize(place == "after step()")
        self.scaler.update()
        moved = (self.weight.detach() - before).abs().max()
        return StepResult(self._steps_taken > steps_before, float(moved))

    def _sanitize(self, is_here: bool) -> None:
        if self.sanitizer is None or not is_here:
            return
        told = {"scaler": self.scaler, "optimizer": self.optimizer} if self.with_scaler else {}
        self.sanitizer([self.weight], **told)

    def _count(self) -> None:
        self._steps_taken += 1


class _TwoGroups(nn.Module):
    """Two weights, for an optimizer with two parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.second = nn.Parameter(torch.tensor([0.5]))

    def groups(self) -> Iterator[dict[str, object]]:
        yield {"params": [self.first]}
        yield {"params": [self.second], "weight_decay": 0.0}


@dataclass(slots=True, kw_only=True)
class OptimizerTwin:
    """A small model under a gated optimizer, compared step by step with an ungated copy."""

    KINDS: ClassVar[Mapping[str, Callable[..., Optimizer]]] = {
        "SGD": lambda groups: SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
        "AdamW": lambda groups: AdamW(groups, lr=0.1),
        "fused AdamW": lambda groups: AdamW(groups, lr=0.1, fused=True),
        "Adagrad": lambda groups: Adagrad(groups, lr=0.1),
        "RMSprop": lambda groups: RMSprop(groups, lr=0.1),
    }

    model: nn.Module
    optimizer: Optimizer

    @classmethod
    def of(cls, kind: str) -> OptimizerTwin:
        """Return a fresh twin; ``kind`` is a key of ``KINDS``."""
        model = _TwoGroups()
        return cls(model=model, optimizer=cls.KINDS[kind](list(model.groups())))

    def step(self, entry: float) -> str:
        """Do one step with ``entry`` in the gradients; return which parts are wrong, or ``""``.

        Right is the state before the step, or the state after the same step of an ungated copy.
        """
        model, optimizer = copy.deepcopy((self.model, self.optimizer))  # a copy has no hooks
        _set_gradients(model, entry)
        gradients = _set_gradients(self.model, entry)
        before = fingerprint_parts(self.model, self.optimizer)
        optimizer.step()
        taken = fingerprint_parts(model, optimizer)
        self.optimizer.step()
        after = fingerprint_parts(self.model, self.optimizer)
        wrong = [name for name in after if after[name] != taken[name]] if after != before else []
        if any(p.grad is not g for p, g in zip(self.model.parameters(), gradients, strict=True)):
            wrong.append("a .grad is another tensor than before")
        return ", ".join(wrong)


def _set_gradients(model: nn.Module, entry: float) -> list[Tensor]:
    gradients = []
    for parameter in model.parameters():
        gradient = torch.full_like(parameter, 0.5)
        gradient[0] = entry
        parameter.grad = gradient
        gradients.append(gradient)
    return gradients

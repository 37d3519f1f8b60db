"""Which optimizer holds which parameter: is everything that should train held once?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gradguard.scaler import innermost_optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Holders:
    """How the parameters of a model and those of its optimizers match.

    Attributes:
        trainable: names of the parameters that require grad; tied ones once.
        frozen: names of the others.
        held: names of the trainable ones that an optimizer holds.
        missing: trainable ones that none holds.
        twice: those that are held more than once.
        foreign: how many tensors of the optimizers are not the model's.
        foreign_like_missing: how many of these have the shape of a missing one.
        rates: learning rate by name of the parameter; None where it is no number.
        initial_rates: rate that a scheduler began with, likewise.
    """

    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    held: tuple[str, ...]
    missing: tuple[str, ...]
    twice: tuple[str, ...]
    foreign: int
    foreign_like_missing: int
    rates: Mapping[str, float | None]
    initial_rates: Mapping[str, float | None]


def read_holders(model: nn.Module, optimizers: Mapping[str, object]) -> Holders:
    """Match parameters by identity. Sync: waits for rates that are tensors on an accelerator."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        group for one in optimizers.values() for group in innermost_optimizer(one).param_groups
    ]
    held = [(p, group) for group in groups for p in group["params"]]
    counts = Counter(id(p) for p, _ in held)
    own = dict(model.named_parameters())
    trainable = [name for name, p in own.items() if p.requires_grad]
    missing = [name for name in trainable if id(own[name]) not in counts]
    foreign = [p for p, _ in held if id(p) not in names]
    wanted = {own[name].shape for name in missing}
    return Holders(
        trainable=tuple(trainable),
        frozen=tuple(name for name, p in own.items() if not p.requires_grad),
        held=tuple(name for name in trainable if id(own[name]) in counts),
        missing=tuple(missing),
        twice=tuple(name for name in trainable if counts[id(own[name])] > 1),
        foreign=len(foreign),
        foreign_like_missing=sum(p.shape in wanted for p in foreign),
        rates={names[id(p)]: _number(g.get("lr")) for p, g in held if id(p) in names},
        initial_rates={
            names[id(p)]: _number(g.get("initial_lr")) for p, g in held if id(p) in names
        },
    )


def _number(value: object) -> float | None:
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None

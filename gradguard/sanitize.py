"""NaN-only gradient sanitization that cannot hide an overflow from the loss scaler.

The order contract. A GradScaler decides in ``unscale_`` (or in ``step``, which calls it) whether a step is
skipped, by looking for NaN and Inf. Whatever removes NaN *before* that removes the evidence: half-precision
overflow often shows up as NaN alone, the scaler never lowers its scale, and training stands still for
good. So with an active scaler nothing is written before ``unscale_``, under any policy. After it the decision
has been taken, and writing can no longer change it.

Every float and complex dtype is covered (complex by component, float8 too), and so are all dense layouts,
expanded gradients, sparse ones (values after coalescing), jagged ones and local shards of DTensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradguard.gradient_memory import count_entries, gradient_memory, zero_nan_
from gradguard.norms import nonfinite_counts, tensor_norms
from gradguard.scaler import innermost_optimizer, scaler_stage

Policy = Literal["report", "zero_nan"]
"""``"report"`` counts and changes nothing; ``"zero_nan"`` also writes 0 for NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SanitizedGradient:
    """What was found in one gradient, and what was written.

    Attributes:
        name: name of the parameter, or ``parameters[3]`` when none was given.
        entries: number of real numbers in it: two per complex entry, stored values if sparse, this
            rank's shard if distributed.
        nan_count: NaN entries found.
        inf_count: infinite entries found; they are never written.
        zeroed: NaN entries that were replaced by 0.
    """

    name: str
    entries: int
    nan_count: int = 0
    inf_count: int = 0
    zeroed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SanitizeReport:
    """What :func:`sanitize_gradients_` saw and did in one call.

    Attributes:
        policy: the policy asked for.
        gradients: one entry per parameter that has a gradient, in the order given.
        stage: how far the scaler is with this optimizer: ``"disabled"``, ``"ready"``, ``"unscaled"``
            or ``"stepped"``; None without a scaler or without an optimizer.
        refused: why NaN entries were left where they are; None when there was nothing to refuse.
    """

    policy: Policy
    gradients: tuple[SanitizedGradient, ...]
    stage: str | None
    refused: str | None

    @property
    def decision_taken(self) -> bool | None:
        """Whether the scaler had decided about this step already; None when that is not known."""
        return None if self.stage is None else self.stage in ("unscaled", "stepped")

    @property
    def entries(self) -> int:
        """Number of real numbers looked at."""
        return sum(gradient.entries for gradient in self.gradients)

    @property
    def nan_count(self) -> int:
        """NaN entries in all gradients, as found."""
        return sum(gradient.nan_count for gradient in self.gradients)

    @property
    def inf_count(self) -> int:
        """Infinite entries in all gradients."""
        return sum(gradient.inf_count for gradient in self.gradients)

    @property
    def zeroed(self) -> int:
        """NaN entries that were replaced by 0."""
        return sum(gradient.zeroed for gradient in self.gradients)


@torch.no_grad()
def sanitize_gradients_(
    parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    *,
    scaler: GradScaler | None,
    optimizer: Optimizer | None = None,
    policy: Policy = "report",
    max_fraction: float = 0.01,
) -> SanitizeReport:
    """Count NaN and Inf in the gradients of ``parameters`` and, if asked to, write 0 for NaN in place.

    ``zero_nan`` changes no other bit: infinities, negative zeros, subnormals and clean gradients stay as
    they are, and so do dtype, strides and storage. It zeroes every NaN or none. It leaves all of them,
    and ``report.refused`` says why,

    - before ``scaler.unscale_(optimizer)`` with an active scaler: NaN there is usually an overflow,
      and the scaler must see it to skip the step and lower its scale;
    - when more than ``max_fraction`` of all entries are NaN: that is no stray NaN but a broken step.

    After ``unscale_`` the scaler has decided; it skips the step of a gradient that held NaN or Inf then,
    whatever is written (``report.decision_taken``). As after every skipped step, zero the gradients before
    the next backward pass; a parameter must not belong to a second optimizer on the same scaler.

    Counts and fraction of a DTensor are this rank's. A shared parameter is treated once.

    Args:
        parameters: parameters, or ``(name, parameter)`` pairs as ``model.named_parameters()`` gives.
        scaler: the loss scaler that the gradients are scaled with; None when there is none. Required,
            because leaving it out would hide overflows.
        optimizer: the optimizer whose ``unscale_`` decides about these parameters.
        policy: ``"report"`` or ``"zero_nan"``.
        max_fraction: largest share of NaN, from 0 to 1, that ``zero_nan`` still replaces.

    Raises:
        TypeError: something that is no tensor was given, or a gradient of a kind that cannot be read.
        ValueError: an option is out of range, no parameter was given, ``zero_nan`` was asked for with a
            scaler but no optimizer, or a parameter is not in ``optimizer``.

    Sync: one copy to the host (the norms), and a second one when a gradient is not finite.
    """
    _check_options(policy, max_fraction)
    given = _named(parameters)
    stage = _stage(scaler, optimizer, policy, given)
    memory = {n: gradient_memory(n, p.grad) for n, p in given.items() if p.grad is not None}
    report = SanitizeReport(policy=policy, gradients=_look(memory), stage=stage, refused=None)
    if policy == "report" or report.nan_count == 0:
        return report
    return _zeroed(report, memory, max_fraction)


def persistent_nan(reports: Sequence[SanitizeReport], *, steps: int = 6) -> tuple[str, ...]:
    """Return the names of parameters that held NaN in each of the last ``steps`` reports.

    With one report per attempted step, taken before ``unscale_``, the scaler has lowered its scale
    ``steps`` times meanwhile, by a factor of 64 at the defaults. NaN that survives this is no overflow:
    look for its source in the data, the loss or the forward pass.

    Raises:
        ValueError: ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"looking for persistent NaN: steps must be 1 or more, got {steps}")
    if len(reports) < steps:
        return ()
    held = [{g.name for g in report.gradients if g.nan_count} for report in reports[-steps:]]
    everywhere = set.intersection(*held)
    return tuple(g.name for g in reports[-1].gradients if g.name in everywhere)


def _check_options(policy: str, max_fraction: float) -> None:
    known = get_args(Policy)
    if policy not in known:
        raise ValueError(f"sanitizing gradients: unknown policy {policy!r}; known: {known}")
    if not 0.0 <= max_fraction <= 1.0:  # also False for NaN
        raise ValueError(
            f"sanitizing gradients: max_fraction is a share from 0 to 1, got {max_fraction}"
        )


def _named(parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the distinct parameters by name; a shared one keeps its first name."""
    if isinstance(parameters, Tensor | nn.Module):
        raise TypeError(
            f"sanitizing gradients: expected several parameters, got one {type(parameters).__name__}; "
            "pass model.named_parameters() or a list"
        )
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for index, entry in enumerate(parameters):
        name, tensor = entry if isinstance(entry, tuple) else (f"parameters[{index}]", entry)
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"sanitizing gradients: {name} is a {type(tensor).__name__}; expected a parameter "
                "(pass model.parameters(), not gradients or groups)"
            )
        if id(tensor) in seen:
            continue
        if name in named:
            raise ValueError(
                f"sanitizing gradients: two parameters are called {name!r}, and the report could not "
                "tell them apart; give each a name of its own"
            )
        seen.add(id(tensor))
        named[name] = tensor
    if not named:
        raise ValueError(
            "sanitizing gradients: got no parameters; was a generator used up before? "
            "Pass model.named_parameters()"
        )
    return named


def _stage(
    scaler: GradScaler | None, optimizer: Optimizer | None, policy: str, given: dict[str, Tensor]
) -> str | None:
    if scaler is None or (optimizer is None and policy == "report"):
        return None
    if optimizer is None:
        raise ValueError(
            "sanitizing gradients: zero_nan with a loss scaler needs the optimizer too, to know "
            "whether the scaler has looked at its gradients; pass optimizer=..."
        )
    stage = scaler_stage(scaler, optimizer)
    if policy == "zero_nan" and stage != "disabled":
        _check_ownership(given, optimizer)
    return stage


def _check_ownership(given: dict[str, Tensor], optimizer: Optimizer) -> None:
    """Refuse parameters about which the scaler decides elsewhere, perhaps later."""
    groups = innermost_optimizer(optimizer).param_groups
    owned = {id(parameter) for group in groups for parameter in group["params"]}
    for name, parameter in given.items():
        if parameter.grad is not None and id(parameter) not in owned:
            raise ValueError(
                f"sanitizing gradients: {name} is not in the optimizer given, so the scaler may not "
                "have looked at its gradient; call once per optimizer, with that one's parameters"
            )


def _look(gradients: dict[str, Tensor]) -> tuple[SanitizedGradient, ...]:
    """Count the non-finite entries; exact counting is dear, so only where the norm says something."""
    if not gradients:
        return ()
    norms = tensor_norms(list(gradients.values())).isfinite().tolist()
    suspects = [name for name, fine in zip(gradients, norms, strict=True) if not fine]
    counts = _exact_counts({name: gradients[name] for name in suspects}) if suspects else {}
    return tuple(
        SanitizedGradient(
            name=name,
            entries=count_entries(gradient),
            nan_count=counts.get(name, (0, 0))[0],
            inf_count=counts.get(name, (0, 0))[1],
        )
        for name, gradient in gradients.items()
    )


def _exact_counts(gradients: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    nan, inf = nonfinite_counts(list(gradients.values())).tolist()
    return dict(zip(gradients, zip(nan, inf, strict=True), strict=True))


def _zeroed(
    report: SanitizeReport, memory: dict[str, Tensor], max_fraction: float
) -> SanitizeReport:
    """Write 0 for every NaN, or for none, and return the report with what became of them."""
    refused = _refusal(report, max_fraction)
    if refused is not None:
        return replace(report, refused=refused)
    for entry in report.gradients:
        if entry.nan_count:
            zero_nan_(memory[entry.name])
    written = tuple(replace(entry, zeroed=entry.nan_count) for entry in report.gradients)
    return replace(report, gradients=written)


def _refusal(report: SanitizeReport, max_fraction: float) -> str | None:
    first = next(gradient.name for gradient in report.gradients if gradient.nan_count)
    found = f"{report.nan_count} of {report.entries} gradient entries are NaN (first: {first})"
    if report.stage == "ready":
        return (
            f"{found} and were left alone: the loss scaler has not looked at them yet, they are "
            "probably an overflow, and writing 0 would make it take a step that it has to skip"
        )
    if report.nan_count > max_fraction * report.entries:
        return (
            f"{found}, more than max_fraction={max_fraction:g}, and were left alone: this step is "
            "broken, not blemished; look for the source of the NaN"
        )
    return None

"""How far one optimizer step moved the parameters: sampled on every step, exact on request.

A snapshot is taken right before the step and the difference right after it, so nothing that happens
between steps (EMA, SWA, a weight swap) can mask the movement. Sampled readings look at fixed strided
positions and state their standard error; positions are never drawn from a random generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gradguard.norms import dense_values
from gradguard.records import Drift
from gradguard.sampling import (
    SAMPLE_BUDGET,
    SAMPLES_PER_TENSOR,
    ParameterSample,
    sample_quota,
    sample_runs,
    wide_dtype,
)

_DENSE_FRACTION = 0.5
"""From which share of moved values on a table is no embedding of which a step moves some rows."""

_FIELDS = 4  # update^2, its sampling variance, moved, weight^2


@dataclass(frozen=True, slots=True)
class DriftReport:
    """Movement of one step: the whole, per group and (when asked for) per parameter."""

    overall: Drift
    groups: tuple[Drift, ...]
    parameters: tuple[Drift, ...]


@dataclass(frozen=True, slots=True)
class DriftLayout:
    """How to read the sums of a :class:`DriftMeter`; holds numbers and names, no tensors."""

    names: tuple[str, ...]
    group_sizes: tuple[int, ...]
    sampled: tuple[int, ...]
    totals: tuple[int, ...]
    exact: bool

    def report(self, values: Sequence[float], *, detailed: bool) -> DriftReport:
        """Return the report of what :meth:`DriftMeter.sums` gave, once it is on the host. Sync: none."""
        rows = [values[i : i + _FIELDS] for i in range(0, len(values), _FIELDS)]
        parameters: tuple[Drift, ...] = ()
        if detailed or self.exact:
            parameters = tuple(
                _drift(name, row, sampled=n, total=t)
                for name, row, n, t in zip(self.names, rows, self.sampled, self.totals, strict=True)
            )
            rows = _summed(rows, self.group_sizes)
        group_sampled = _merged(self.sampled, self.group_sizes)
        group_totals = _merged(self.totals, self.group_sizes)
        groups = tuple(
            _drift(f"group {i}", row, sampled=n, total=t)
            for i, (row, n, t) in enumerate(zip(rows, group_sampled, group_totals, strict=True))
        )
        whole = _summed(rows, [len(rows)])[0]
        overall = _drift("all", whole, sampled=sum(self.sampled), total=sum(self.totals))
        return DriftReport(overall, groups, parameters)


class DriftMeter:
    """Reads how far one optimizer step moved the parameters.

    ``mark()`` right before ``optimizer.step()``, ``read()`` right after it::

        meter = DriftMeter(model.named_parameters())
        meter.mark(); optimizer.step(); print(meter.read().overall.update_to_weight)

    Args:
        named_parameters: pairs of name and parameter, as from ``model.named_parameters()``.
        exact: look at every value instead of a sample.
        group_sizes: numbers of consecutive parameters that form a group; default one group.
        per_tensor: samples per parameter at most; budget: samples in all, about.

    Memory: sampled, the samples; exact, one copy of the parameters between mark and read.

    Raises:
        ValueError: no parameters, or group sizes that do not add up.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        exact: bool = False,
        group_sizes: Sequence[int] | None = None,
        per_tensor: int = SAMPLES_PER_TENSOR,
        budget: int = SAMPLE_BUDGET,
    ) -> None:
        named = list(named_parameters)
        if not named:
            raise ValueError("DriftMeter got no parameters; pass model.named_parameters()")
        self._parameters = [parameter for _, parameter in named]
        self._group_sizes = list(group_sizes) if group_sizes is not None else [len(named)]
        if sum(self._group_sizes) != len(named):
            raise ValueError(
                f"DriftMeter: group_sizes {self._group_sizes} add up to {sum(self._group_sizes)}, "
                f"but there are {len(named)} parameters"
            )
        self._exact = exact
        self._sample = ParameterSample(
            self._parameters, sections=self._group_sizes, per_tensor=per_tensor, budget=budget
        )
        self._before: Tensor | list[Tensor] | None = None
        self.layout = DriftLayout(
            names=tuple(name for name, _ in named),
            group_sizes=tuple(self._group_sizes),
            sampled=tuple(self._sample.totals if exact else self._sample.counts),
            totals=tuple(self._sample.totals),
            exact=exact,
        )

    def learn(self, movement: Iterable[Drift]) -> None:
        """Spare tables of which half or more moved the search for the rows that do. Sync: none.

        Args:
            movement: of single parameters in one step that was taken, by their names. A table that is not
                among them is searched again.
        """
        moving = {one.name for one in movement if one.moved_fraction >= _DENSE_FRACTION}
        names = self.layout.names
        self._sample.set_dense({index for index, name in enumerate(names) if name in moving})

    def mark(self, gradients: Sequence[Tensor | None] | None = None) -> None:
        """Copy the (sampled) values, right before the step; gradients default to ``.grad``.

        Sync: none.
        """
        with torch.no_grad():
            if self._exact:
                self._before = [dense_values(p).clone() for p in self._parameters]
                return
            found = [p.grad for p in self._parameters] if gradients is None else gradients
            self._sample.aim(found)
            self._before = self._sample.take()

    def read(self) -> DriftReport:
        """Return the movement since :meth:`mark`, per parameter too. Sync: one copy to the host.

        Raises:
            RuntimeError: ``mark()`` was not called before.
        """
        return self.layout.report(self.sums(detailed=True).tolist(), detailed=True)

    def sums(self, *, detailed: bool) -> Tensor:
        """Return the sums behind a report as a 1-D float64 tensor. Sync: none.

        ``detailed`` gives one row per parameter instead of one per group.
        """
        if self._before is None:
            raise RuntimeError("DriftMeter.read() before mark(): nothing to compare with")
        before, self._before = self._before, None
        with torch.no_grad():
            if isinstance(before, list):
                rows = torch.stack(
                    [
                        _exact_sums(b, dense_values(p))
                        for b, p in zip(before, self._parameters, strict=True)
                    ]
                )
                return rows.reshape(-1)
            return self._sampled_sums(before, detailed=detailed)

    def _sampled_sums(self, before: Tensor, *, detailed: bool) -> Tensor:
        after = self._sample.take()
        layout = self._sample.layout()
        wide = layout.weights.dtype
        terms = _terms(before.to(wide), after.to(wide))
        factors = (layout.weights, layout.error_weights, layout.weights, layout.weights)
        pairs = list(zip(factors, terms, strict=True))
        if detailed:
            each = torch.zeros(_FIELDS, len(self._parameters), dtype=wide, device=before.device)
            # All fields at once, in rows of four, take five times as long.
            for sums, (factor, term) in zip(each, pairs, strict=True):
                sums.index_add_(0, layout.parameters, factor * term)
            return each.t().reshape(-1)
        fields = [_dots(factor, term, layout.sections) for factor, term in pairs]
        return torch.stack([value for row in zip(*fields, strict=True) for value in row])


def _dots(factor: Tensor, term: Tensor, sections: list[int]) -> list[Tensor]:
    """Return one dot product for each section of both."""
    if len(sections) == 1:
        return [torch.dot(factor, term)]
    parts = zip(torch.split(factor, sections), torch.split(term, sections), strict=True)
    return [torch.dot(*part) for part in parts]


def _terms(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return by sample: update^2, its square, whether it moved, weight^2; both inputs are written over.

    A value has moved where the square of its difference is not 0; in float64 that never underflows.
    """
    square = after.sub_(before).square_()
    moved = torch.empty_like(square)
    torch.ne(square, 0, out=moved)
    return square, square * square, moved, before.square_()


def _exact_sums(before: Tensor, after: Tensor) -> Tensor:
    wide = wide_dtype(before.device)
    update = torch.linalg.vector_norm(after.to(wide) - before.to(wide)) ** 2
    weight = torch.linalg.vector_norm(before, dtype=wide) ** 2
    moved = (before != after).sum().to(wide)
    return torch.stack((update, torch.zeros_like(update), moved, weight))


def _merged(counts: Sequence[int], sizes: Sequence[int]) -> list[int]:
    edges = list(accumulate(sizes, initial=0))
    return [sum(counts[a:b]) for a, b in pairwise(edges)]


def _summed(rows: Sequence[Sequence[float]], sizes: Sequence[int]) -> list[Sequence[float]]:
    edges = list(accumulate(sizes, initial=0))
    return [[sum(row[k] for row in rows[a:b]) for k in range(_FIELDS)] for a, b in pairwise(edges)]


def _drift(name: str, row: Sequence[float], *, sampled: int, total: int) -> Drift:
    update, variance, moved, weight = row
    error = 0.5 * math.sqrt(variance) / update if update > 0 and math.isfinite(variance) else 0.0
    return Drift(
        name=name,
        update_norm=math.sqrt(update) if update >= 0 else math.nan,
        weight_norm=math.sqrt(weight) if weight >= 0 else math.nan,
        moved_fraction=min(1.0, round(moved / total, 12)) if total else 0.0,
        sampled=sampled,
        total=total,
        relative_error=error,
    )


def averaged_distance(live: Sequence[Tensor], averaged: Sequence[Tensor]) -> Tensor:
    """Return sampled squared norms ``(|averaged - live|^2, |live|^2)`` as a tensor of shape (2,).

    Sync: none.
    """
    with torch.no_grad():
        rows = [
            _distance(*_alike(a, b), sample_quota(a.numel(), len(live)))
            for a, b in zip(live, averaged, strict=True)
        ]
        return torch.stack(rows).sum(0)


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return both so that equal positions in memory hold equal entries (a copy only where needed)."""
    if one.stride() == other.stride():
        return one, other
    return one.detach().contiguous(), other.detach().contiguous()


def _distance(live: Tensor, averaged: Tensor, quota: int) -> Tensor:
    wide = wide_dtype(live.device)
    start = torch.cat(sample_runs(live, quota)).to(wide)
    end = torch.cat(sample_runs(averaged, quota)).to(start.device, wide, non_blocking=True)
    weight = dense_values(live).numel() / max(1, start.numel())
    return weight * torch.stack(((end - start).square().sum(), start.square().sum()))


def averaged_lag(live: Iterable[Tensor], averaged: Iterable[Tensor]) -> float | None:
    """Return how far an averaged copy (EMA, SWA) lies behind: |averaged - live| / |live|, sampled.

    Args:
        live: the parameters that the optimizer moves.
        averaged: their averaged copies, in the same order and of the same shapes.

    Returns:
        The relative distance; None when the live parameters are all zero.

    Raises:
        ValueError: the two lists do not match.

    Sync: one copy to the host.
    """
    ones, others = list(live), list(averaged)
    shapes, other_shapes = [tuple(p.shape) for p in ones], [tuple(p.shape) for p in others]
    if not ones or shapes != other_shapes:
        raise ValueError(
            f"reading the lag of an averaged copy: {len(ones)} live and {len(others)} averaged "
            "parameters, which must match one to one in number and shape; "
            "pass model.parameters() and averaged_model.parameters()"
        )
    lag, norm = averaged_distance(ones, others).tolist()
    return None if norm == 0 else math.sqrt(lag / norm)

"""Fixed positions in many parameters, read with one concatenation and without a random generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.norms import dense_values

SAMPLES_PER_TENSOR = 1024
SAMPLE_BUDGET = 262_144
_SHORTEST_RUN = 8
_VALUES_PER_RUN = 1024
_VALUES_PER_SAMPLE = 256
_LEAST_PER_TENSOR = 64
_TABLE_MIN_ROWS = 1024
_TABLE_ROWS, _TABLE_COLUMNS = 8, 16


def sample_quota(
    values: int,
    tensors: int,
    *,
    per_tensor: int = SAMPLES_PER_TENSOR,
    budget: int = SAMPLE_BUDGET,
) -> int:
    """Return how many of the ``values`` of one of ``tensors`` tensors to look at.

    One in 256, within 64 and ``per_tensor``: large tensors carry the norm and can afford it.
    """
    most = max(_LEAST_PER_TENSOR, min(per_tensor, budget // max(1, tensors)))
    return min(most, max(_LEAST_PER_TENSOR, values // _VALUES_PER_SAMPLE))


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype of a device: float64, except on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def group_index(sizes: Sequence[int]) -> Tensor:
    """Return 0 ``sizes[0]`` times, then 1 ``sizes[1]`` times, and so on: int64 on the CPU."""
    indices = [index for index, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(indices, dtype=torch.int64)


def sample_runs(tensor: Tensor, quota: int) -> list[Tensor]:
    """Return 1-D views into ``tensor``: all of it if it has at most ``quota`` values, else evenly spaced runs.

    Nothing is copied: the views show what the tensor holds whenever they are read. Runs are contiguous
    because torch concatenates those by plain copies, strided views by one kernel each; and a small
    tensor has two, because what is left of the cost is the number of views.
    """
    values = dense_values(tensor)
    packed = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))
    if not packed.is_contiguous():
        # Holes or overlaps in memory: one row is the most that has a single stride.
        return [values[(0,) * (values.dim() - 1)][:quota]]
    flat = packed.view(-1)
    if len(flat) <= quota:
        return [flat]
    runs = max(2, min(len(flat) // _VALUES_PER_RUN, quota // _SHORTEST_RUN))
    length = quota // runs
    starts = [index * (len(flat) - length) // (runs - 1) for index in range(runs)]
    return [flat[start : start + length] for start in starts]


@dataclass(frozen=True, slots=True)
class SampleLayout:
    """How the samples lie.

    Attributes:
        parameters: index of the parameter each sample belongs to, int64.
        weights: how many values each sample stands for.
        error_weights: factor of its fourth power in the sampling variance of a sum of squares:
            Horvitz-Thompson's with the second moment in place of the variance, as if the values of one
            run all moved alike. An upper bound; 0 where everything is looked at.
    """

    parameters: Tensor
    weights: Tensor
    error_weights: Tensor


class ParameterSample:
    """Fixed positions in a list of parameters, read with one concatenation.

    Large tables (1,024 rows and more) get a few extra positions where the gradient is largest: an
    embedding that updates a handful of rows would otherwise look as if it stood still.

    Memory: the sampled values (at most ``per_tensor`` a tensor and about ``budget`` in all).
    """

    def __init__(self, parameters: Sequence[Tensor], *, per_tensor: int, budget: int) -> None:
        self._parameters = tuple(parameters)
        count = len(self._parameters)
        self._runs = [
            sample_runs(p, sample_quota(p.numel(), count, per_tensor=per_tensor, budget=budget))
            for p in self._parameters
        ]
        self._views = [run for runs in self._runs for run in runs]
        self._rows: dict[int, Tensor] = {}
        self._layouts: dict[tuple[tuple[int, int], ...], SampleLayout] = {}
        self.counts = [sum(run.numel() for run in runs) for runs in self._runs]
        self.totals = [dense_values(p).numel() for p in self._parameters]
        partly = zip(self._parameters, self.counts, strict=True)
        self._tables = [i for i, (p, seen) in enumerate(partly) if _is_table(p, seen)]

    def aim(self, gradients: Sequence[Tensor | None]) -> None:
        """Choose the extra positions of large tables from their gradients. Sync: none."""
        self._rows = {}
        for index in self._tables:
            rows = _largest_rows(gradients[index])
            if rows is not None:
                self._rows[index] = rows

    def take(self) -> Tensor:
        """Return a copy of the sampled values, 1-D. Sync: none."""
        if not self._rows:
            return torch.cat(self._views)
        pieces: list[Tensor] = []
        for index, runs in enumerate(self._runs):
            pieces += runs
            if index in self._rows:
                pieces.append(_table_rows(self._parameters[index], self._rows[index]))
        return torch.cat(pieces)

    def layout(self) -> SampleLayout:
        """Return the layout of what :meth:`take` returns now. Sync: none."""
        key = tuple((index, len(rows)) for index, rows in self._rows.items())
        if key not in self._layouts:
            self._layouts = {key: self._new_layout()}
        return self._layouts[key]

    def _new_layout(self) -> SampleLayout:
        device = self._views[0].device
        wide = wide_dtype(device)
        sizes: list[int] = []
        weights: list[Tensor] = []
        lengths: list[Tensor] = []
        for index, runs in enumerate(self._runs):
            extra = self._table_samples(index)
            weight = self.totals[index] / max(1, self.counts[index])
            weights += [torch.full((self.counts[index],), weight, dtype=wide), torch.ones(extra)]
            lengths += [torch.full((run.numel(),), float(run.numel())) for run in runs]
            lengths.append(torch.zeros(extra))
            sizes.append(self.counts[index] + extra)
        every = torch.cat(weights).to(device, wide, non_blocking=True)
        run_lengths = torch.cat(lengths).to(device, wide, non_blocking=True)
        owners = group_index(sizes).to(device, non_blocking=True)
        return SampleLayout(owners, every, run_lengths * (every - 1) * every)

    def _table_samples(self, index: int) -> int:
        if index not in self._rows:
            return 0
        columns = min(_TABLE_COLUMNS, self._parameters[index][0].numel())
        return len(self._rows[index]) * columns


def _is_table(parameter: Tensor, seen: int) -> bool:
    return (
        parameter.dim() >= 2
        and parameter.shape[0] >= _TABLE_MIN_ROWS
        and parameter.numel() > seen
        and not parameter.is_complex()
        and type(parameter.data) is Tensor
    )


def _largest_rows(gradient: Tensor | None) -> Tensor | None:
    """Return indices of rows with a large gradient; None without one. Sync: none."""
    if gradient is None or gradient.numel() == 0:
        return None
    if gradient.layout is torch.sparse_coo:
        rows = gradient._indices()[0, :_TABLE_ROWS]  # noqa: SLF001 (indices() would coalesce)
        return rows.clone() if len(rows) else None
    if gradient.layout is not torch.strided:
        return None
    return gradient.detach().flatten(1)[:, 0].abs().topk(_TABLE_ROWS).indices


def _table_rows(parameter: Tensor, rows: Tensor) -> Tensor:
    columns = parameter.detach().flatten(1)[:, :_TABLE_COLUMNS]
    return columns.index_select(0, rows).reshape(-1)

"""Fixed positions in many parameters, read with one concatenation and without a random generator."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, repeat

import torch
from torch import Tensor

from gradguard.norms import dense_values

SAMPLES_PER_TENSOR = 1024
SAMPLE_BUDGET = 262_144
_MANY_RUNS = 8
_VALUES_PER_RUN = 1024
_VALUES_PER_SAMPLE = 256
_MANY_TENSORS, _VALUES_PER_VIEW = 128, 4096
_LEAST_PER_TENSOR = 64
_TABLE_MIN_ROWS = 1024
_TABLE_ROWS, _TABLE_COLUMNS = 8, 16
_LINE = 16
"""How many float32 values one fetch from memory brings: shorter runs would fetch what they do not read, and one
that begins with a fetch needs no second one."""


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


def sample_runs(tensor: Tensor, quota: int, *, among: int = 1) -> list[Tensor]:
    """Return 1-D views into ``tensor``: all of it if it has at most ``quota`` values, else evenly spaced runs.

    Nothing is copied: the views show what the tensor holds whenever they are read. Runs are contiguous
    because torch concatenates those by plain copies, strided views by one kernel each. What is left of the cost
    is the number of views: a small tensor has two, and ``among`` hundreds of tensors only one, from its middle.
    """
    values = dense_values(tensor)
    packed = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))
    if not packed.is_contiguous():
        # Holes or overlaps in memory: one row is the most that has a single stride.
        return [values[(0,) * (values.dim() - 1)][:quota]]
    flat = packed.view(-1)
    if len(flat) <= quota:
        return [flat]
    if among >= _MANY_TENSORS and len(flat) < _VALUES_PER_VIEW:
        start = (len(flat) - quota) // 2
        return [flat[start : start + quota]]
    runs = max(2, min(len(flat) // _VALUES_PER_RUN, quota // _LINE))
    length = quota // runs
    gap = (len(flat) - length) // (runs - 1)
    if gap >= _LINE**2:
        gap -= gap % _LINE
    return [flat[index * gap : index * gap + length] for index in range(runs)]


@dataclass(frozen=True, slots=True)
class SampleLayout:
    """How the samples lie.

    Attributes:
        parameters: index of the parameter each sample belongs to, int32.
        sections: how many samples each section holds, in order.
        weights: how many values each sample stands for.
        error_weights: factor of its fourth power in the sampling variance of a sum of squares:
            Horvitz-Thompson's with the second moment in place of the variance, as if the values of one
            run all moved alike. An upper bound; 0 where everything is looked at.
    """

    parameters: Tensor
    sections: list[int]
    weights: Tensor
    error_weights: Tensor


class ParameterSample:
    """Fixed positions in a list of parameters, read with one concatenation.

    Args:
        parameters: what is sampled.
        sections: numbers of consecutive parameters whose samples lie together.
        per_tensor: samples per parameter at most; budget: samples in all, about.

    Large tables (1,024 rows and more) get a few extra positions where the gradient is largest: an
    embedding that updates a handful of rows would otherwise look as if it stood still. Tables that are
    known to move all over (:meth:`set_dense`) need none.

    Memory: the sampled values (at most ``per_tensor`` a tensor and about ``budget`` in all).
    """

    def __init__(
        self, parameters: Sequence[Tensor], *, sections: Sequence[int], per_tensor: int, budget: int
    ) -> None:
        self._parameters = tuple(parameters)
        count = len(self._parameters)
        self._runs = [
            sample_runs(
                p,
                sample_quota(p.numel(), count, per_tensor=per_tensor, budget=budget),
                among=count,
            )
            for p in self._parameters
        ]
        edges = list(accumulate(sections, initial=0))
        self._sections = [_Section(self._runs, range(a, b)) for a, b in pairwise(edges)]
        self._rows: dict[int, Tensor] = {}
        self._starts: dict[int, Tensor] = {}
        self._layouts: dict[tuple[tuple[int, int], ...], SampleLayout] = {}
        self.counts = [sum(run.numel() for run in runs) for runs in self._runs]
        self.totals = [dense_values(p).numel() for p in self._parameters]
        partly = zip(self._parameters, self.counts, strict=True)
        self._tables = [i for i, (p, seen) in enumerate(partly) if _is_table(p, seen)]
        matrices = [i for i in self._tables if self._parameters[i].dim() == 2]
        self._columns = {i: _first_columns(self._parameters[i]) for i in matrices}
        self._aimed = tuple(self._tables)

    def set_dense(self, indices: Collection[int]) -> None:
        """Choose no extra positions in these parameters, and in all other tables as before. Sync: none."""
        self._aimed = tuple(index for index in self._tables if index not in indices)

    def aim(self, gradients: Sequence[Tensor | None]) -> None:
        """Choose the extra positions of large tables from their gradients. Sync: none."""
        self._rows = {}
        for index in self._aimed:
            rows = self._largest_rows(index, gradients[index])
            if rows is not None:
                self._rows[index] = rows

    def _largest_rows(self, index: int, gradient: Tensor | None) -> Tensor | None:
        """Return indices of rows with a large gradient; None without one. Sync: none."""
        if gradient is None or gradient.numel() == 0:
            return None
        if gradient.layout is torch.sparse_coo:
            rows = gradient._indices()[0, :_TABLE_ROWS]
            return rows.clone() if len(rows) else None
        if gradient.layout is not torch.strided:
            return None
        first = gradient.detach().flatten(1)[:, 0].abs()
        # The largest of each eighth: a search for the eight largest of all takes several times as long.
        step = len(first) // _TABLE_ROWS
        eighths = first.unfold(0, len(first) - (_TABLE_ROWS - 1) * step, step)
        if index not in self._starts:
            self._starts[index] = torch.arange(_TABLE_ROWS, device=first.device) * step
        return eighths.argmax(1) + self._starts[index]

    def take(self) -> Tensor:
        """Return a copy of the sampled values, 1-D. Sync: none."""
        pieces: list[Tensor] = []
        for section in self._sections:
            pieces += section.pieces()
            pieces += [
                self._table_values(index, rows)
                for index, rows in self._rows.items()
                if index in section.members
            ]
        return torch.cat(pieces)

    def _table_values(self, index: int, rows: Tensor) -> Tensor:
        columns = self._columns.get(index)
        if columns is None:  # more dimensions, which may have to be copied to become one row each
            columns = _first_columns(self._parameters[index].flatten(1))
        return columns.index_select(0, rows).view(-1)

    def layout(self) -> SampleLayout:
        """Return the layout of what :meth:`take` returns now. Sync: none."""
        key = tuple((index, len(rows)) for index, rows in self._rows.items())
        if key not in self._layouts:
            self._layouts = {key: self._new_layout()}
        return self._layouts[key]

    def _new_layout(self) -> SampleLayout:
        device = self._parameters[0].device
        wide = wide_dtype(device)
        parts: list[tuple[int, int, float, float]] = []  # parameter, samples, weight, run length
        counts = []
        for section in self._sections:
            before = len(parts)
            for index in section.order:
                weight = self.totals[index] / max(1, self.counts[index])
                parts += [(index, len(run), weight, len(run)) for run in self._runs[index]]
            extra = [index for index in self._rows if index in section.members]
            parts += [(index, self._table_samples(index), 1.0, 0.0) for index in extra]
            counts.append(sum(part[1] for part in parts[before:]))
        owners, sizes, weights, lengths = zip(*parts, strict=True)
        every = _repeated(weights, sizes, wide).to(device, non_blocking=True)
        run_lengths = _repeated(lengths, sizes, wide).to(device, non_blocking=True)
        return SampleLayout(
            parameters=_repeated(owners, sizes, torch.int32).to(device, non_blocking=True),
            sections=counts,
            weights=every,
            error_weights=run_lengths * (every - 1) * every,
        )

    def _table_samples(self, index: int) -> int:
        if index not in self._rows:
            return 0
        columns = min(_TABLE_COLUMNS, self._parameters[index][0].numel())
        return len(self._rows[index]) * columns


def _repeated(values: Sequence[float], counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return every value as often as its count says, on the CPU. Sync: none."""
    pairs = zip(values, counts, strict=True)
    listed = list(chain.from_iterable(repeat(value, count) for value, count in pairs))
    return torch.tensor(listed, dtype=dtype)


class _Section:
    """The samples of some consecutive parameters: those with many runs first, as blocks of equal runs.

    A block is one strided view of a tensor; torch copies it in one go where it would copy a hundred runs one
    by one. That pays on the CPU; elsewhere one concatenation of all runs is one kernel.
    """

    def __init__(self, runs: Sequence[list[Tensor]], members: range) -> None:
        self.members = members
        first = next((runs[index][0] for index in members), None)
        many = [index for index in members if _is_block(runs[index], first)]
        few = [index for index in members if index not in set(many)]
        self.order = (*many, *few)
        self._blocks = [_block(runs[index]) for index in many]
        self._views = [run for index in few for run in runs[index]]
        if self._blocks:
            sizes = [block.numel() for block in self._blocks]
            copied = torch.empty(sum(sizes), dtype=self._blocks[0].dtype)
            parts = zip(torch.split(copied, sizes), self._blocks, strict=True)
            self._targets = [part.view_as(block) for part, block in parts]
            self._views.insert(0, copied)

    def pieces(self) -> list[Tensor]:
        """Return the values of the blocks, copied, and views of all others. Sync: none.

        The next call writes over them.
        """
        if self._blocks:
            torch._foreach_copy_(self._targets, self._blocks)
        return self._views


def _is_block(runs: list[Tensor], first: Tensor | None) -> bool:
    """Whether there are many runs, on the CPU and of the dtype of the section's first one."""
    one = runs[0]
    alike = first is not None and one.dtype is first.dtype
    return len(runs) >= _MANY_RUNS and alike and one.device.type == "cpu"


def _block(runs: list[Tensor]) -> Tensor:
    """Return evenly spaced runs of one tensor as a view (runs, values)."""
    first, second = runs[0], runs[1]
    gap = second.storage_offset() - first.storage_offset()
    return first.as_strided((len(runs), len(first)), (gap, 1))


def _is_table(parameter: Tensor, seen: int) -> bool:
    return (
        parameter.dim() >= 2
        and parameter.shape[0] >= _TABLE_MIN_ROWS
        and parameter.numel() > seen
        and not parameter.is_complex()
        and type(parameter.data) is Tensor
    )


def _first_columns(matrix: Tensor) -> Tensor:
    """Return a view of the first columns."""
    return matrix.detach()[:, :_TABLE_COLUMNS]

"""Reads the values of a model's parameters: few numbers per tensor, all in one copy to the host.

Nothing here writes to a tensor, draws random numbers or leaves the grad mode changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradguard.norms import dense_values

_EXACT_VALUES = 1_000_000
_EXACT_ROWS = 16_384  # sorting takes microseconds per row, however short it is
_CORNER = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterValues:
    """What the values of one parameter look like; None where it was not measured.

    Attributes:
        rms: root mean square. None also where the squares leave the range of the dtype they are added
            in: float32 (below about 1e-23, above about 1e19), or float64 for float64.
        max_abs: largest magnitude.
        zero_fraction: share of values that are exactly 0.
        distinct_rows: share of distinct rows.
        nonfinite: whether there is a NaN or Inf.
        equal_to: name of another parameter with equal values that is a tensor of its own.
    """

    rms: float | None = None
    max_abs: float | None = None
    zero_fraction: float | None = None
    distinct_rows: float | None = None
    nonfinite: bool | None = None
    equal_to: str | None = None


@dataclass(frozen=True, slots=True)
class _Read:
    """Numbers of one tensor on the host."""

    count: int
    norm: float
    minimum: float
    maximum: float
    peak: float
    nonzero: float
    distinct: float

    def as_values(self) -> ParameterValues:
        rms = self.norm / math.sqrt(self.count)
        out_of_range = math.isfinite(self.peak) and (
            not math.isfinite(rms) or (rms == 0.0 and self.peak > 0.0)
        )
        return ParameterValues(
            rms=None if out_of_range else rms,
            max_abs=self.peak,
            zero_fraction=1.0 - self.nonzero / self.count,
            distinct_rows=None if math.isnan(self.distinct) else self.distinct,
            nonfinite=not math.isfinite(self.peak),
        )


def is_known(tensor: Tensor) -> bool:
    """Whether the tensor has a shape yet; a lazy module's parameters have none before its first call."""
    return not nn.parameter.is_lazy(tensor)


def read_values(parameters: Mapping[str, Tensor]) -> dict[str, ParameterValues]:
    """Return what the values look like, by name; parameters that cannot be read are left out.

    Left out are tensors without values (meta device, lazy, empty) and those of a kind without the
    kernels that it takes. Of a distributed tensor it is this rank's shard, of a sparse one all values.
    Distinct rows are compared exactly; of more than 1,000,000 values or 16,384 rows, the first 256
    rows and columns are. Equal values are looked for among tensors of two or more dimensions.

    Sync: one copy to the host; on an accelerator also one wait per tensor whose rows are compared and
    per pair that looks equal.
    """
    with torch.no_grad():
        rows: dict[str, tuple[Tensor, int]] = {}
        for name, tensor in parameters.items():
            row = _numbers(tensor)
            if row is not None:
                rows[name] = row
        table = _to_host([row for row, _ in rows.values()])
        counts = [count for _, count in rows.values()]
        reads = {
            name: _Read(count, *numbers)
            for name, numbers, count in zip(rows, table, counts, strict=True)
        }
        equal = _equal_pairs(parameters, reads)
    return {
        name: replace(read.as_values(), equal_to=equal.get(name)) for name, read in reads.items()
    }


def _numbers(tensor: Tensor) -> tuple[Tensor, int] | None:
    """Return the six numbers of :class:`_Read`, still on the device, and how many values there are."""
    if tensor.is_meta or not is_known(tensor) or tensor.numel() == 0:
        return None
    try:
        values = dense_values(tensor)
        count = _count(tensor)
        if values.numel() == 0:  # an empty shard, or a sparse tensor that stores nothing
            return None
        if not values.is_floating_point():
            values = values.float()
        wide = torch.float64 if values.dtype is torch.float64 else torch.float32
        lowest, highest = torch.aminmax(values)
        peak = torch.maximum(lowest.abs(), highest.abs())
        nonzero = values
        if tensor.is_complex():
            nonzero = torch.hypot(values[..., 0], values[..., 1])
            peak = nonzero.max()
        numbers = [
            torch.linalg.vector_norm(values, dtype=wide),
            lowest,
            highest,
            peak,
            torch.count_nonzero(nonzero),
        ]
        # float32 holds neither all counts nor float64, but some devices have nothing wider.
        row_dtype = torch.float32 if values.device.type == "mps" else torch.float64
        distinct = torch.full((), _distinct_rows(tensor, values), dtype=row_dtype)
        row = torch.stack([number.to(row_dtype) for number in numbers])
        return torch.cat((row, distinct.reshape(1).to(row.device, non_blocking=True))), count
    except (NotImplementedError, RuntimeError):
        return None  # a tensor subclass, such as quantised weights, without these operations


def _count(tensor: Tensor) -> int:
    """Return how many values this process holds, those that a sparse tensor leaves out included."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel())


def _distinct_rows(tensor: Tensor, values: Tensor) -> float:
    """Return the share of distinct rows; NaN where there are no rows to compare."""
    if tensor.ndim < 2 or tensor.layout is not torch.strided or values.ndim < 2:
        return math.nan
    rows = values.flatten(1)
    if rows.numel() > _EXACT_VALUES or rows.shape[0] > _EXACT_ROWS:
        rows = rows[:_CORNER, :_CORNER]
    distinct: Tensor = torch.unique(rows, dim=0)
    return distinct.shape[0] / rows.shape[0]


def _to_host(rows: Sequence[Tensor]) -> list[list[float]]:
    if not rows:
        return []
    home = rows[0].device
    table: list[list[float]] = torch.stack(
        [row.to(home, rows[0].dtype, non_blocking=True) for row in rows]
    ).tolist()
    return table


def _equal_pairs(parameters: Mapping[str, Tensor], reads: Mapping[str, _Read]) -> dict[str, str]:
    """Return for every parameter that has an equal one the first such."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, read in reads.items():
        tensor = parameters[name]
        constant = read.minimum == read.maximum
        plain = tensor.ndim >= 2 and tensor.layout is torch.strided
        if plain and not constant and math.isfinite(read.peak):
            # Exact whatever the memory layout, which the last bit of a norm is not.
            key = (
                tensor.shape,
                tensor.dtype,
                tensor.device,
                read.minimum,
                read.maximum,
                read.nonzero,
            )
            alike.setdefault(key, []).append(name)
    equal: dict[str, str] = {}
    for names in alike.values():
        for place, name in enumerate(names):
            for other in names[:place]:
                if _is_copy(parameters[name], parameters[other]):
                    equal[name] = other
                    equal.setdefault(other, name)
                    break
    return equal


def _is_copy(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values in memory of their own."""
    first, second = dense_values(one), dense_values(other)
    return first.data_ptr() != second.data_ptr() and torch.equal(first, second)

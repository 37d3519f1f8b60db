"""Statistics of one module's input and output: sums on the device, from which the host works out the rest.

Every kernel costs as much as the arithmetic of hundreds of values: what can be done with numbers that have
arrived is not done before. Sync: none anywhere here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_ROWS, _MIDDLE, _UNITS = 64, 8, 256
_SMALL = 2048
"""Up to how many values a cube is set aside, to share its kernels with others of its shape."""
_NEAR_BOUND = 0.01
_SUM_TOLERANCE = 1e-3
_MOST_CLASSES = 4096

BOUNDS: dict[str, tuple[float, float]] = {
    "Tanh": (-1.0, 1.0),
    "Hardtanh": (-1.0, 1.0),
    "Softsign": (-1.0, 1.0),
    "Sigmoid": (0.0, 1.0),
    "Hardsigmoid": (0.0, 1.0),
}
"""Modules with a bounded output, by class name."""


@dataclass(slots=True)
class ModuleSums:
    """What was read of one call.

    Attributes:
        values: 0-dim tensors by name: fields of a :class:`gradguard.facts.ModuleReading`, and sums.
        sizes: numbers of rows, places in a row (positions and units) and units of what was summed.
        cubes: small ones, of which :func:`add_sums` makes the sums.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    cubes: dict[str, Tensor] = field(default_factory=dict)

    def numbers(self, found: Mapping[str, Sequence[float]]) -> dict[str, float | int]:
        """Return the fields of the reading, once the values are on the host, by name."""
        numbers: dict[str, float | int] = {name: values[0] for name, values in found.items()}
        for side, (rows, places, units) in self.sizes.items():
            numbers[f"{side}_rms"] = math.sqrt(numbers.pop(f"{side}_squares") / (rows * places))
            if rows > 1:
                squares = numbers.pop(f"{side}_spread_squares") / (rows * places)
                common = numbers.pop(f"{side}_spread_sums") / (rows * rows * places)
                numbers[f"{side}_row_std"] = _root(squares - common)
            if side == "output":
                numbers["zero_fraction"] = 1 - numbers.pop("nonzero") / (rows * places)
                numbers["dead_fraction"] = 1 - numbers.pop("alive") / units
            if side == "output" and rows > 1:
                numbers["constant_fraction"] = numbers.pop("constant") / places
        numbers["output_nonfinite"] = int(not math.isfinite(numbers.pop("output_sum")))
        if "input" in self.sizes:
            lowest, highest = numbers.pop("input_lowest"), numbers.pop("input_highest")
            numbers["input_nonfinite"] = int(not (math.isfinite(lowest) and math.isfinite(highest)))
            numbers["input_max"] = highest if math.isnan(highest) else max(-lowest, highest)
        return numbers


def _root(variance: float) -> float:
    """Return the square root; 0 for what rounding has made negative."""
    return 0.0 if variance < 0 else math.sqrt(variance)


def forward_statistics(module: nn.Module, inputs: list[Tensor], output: Tensor) -> ModuleSums:
    """Read one call; :func:`add_sums` does the rest.

    Args:
        module: that was called.
        inputs: its tensor arguments.
        output: its first tensor; floating.
    """
    cube = sample_cube(output)
    found = ModuleSums()
    _read(found, "output", cube, output)
    found.values["output_sum"] = value_sum(output)
    bounds = BOUNDS.get(type(module).__name__)
    if bounds is not None:
        found.values["saturated_fraction"] = _saturated(cube, *bounds)
    first = next((one for one in inputs if usable(one)), None)
    if first is not None and first.data_ptr() != output.data_ptr():  # else written over in place
        _read(found, "input", sample_cube(first), first)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 (the only common class)
            found.values |= _running_statistics(module, first)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None and inputs:
        padding = inputs[0] == module.padding_idx
        found.values["padding_fraction"] = padding.double().mean()
        if padding.dim() == 2 and padding.shape[1] > 2:
            found.values["padding_interior"] = _interior(padding)
    return found


def root_statistics(inputs: list[Tensor], output: Tensor) -> dict[str, Tensor]:
    """Return what is asked of the whole model's output only: repeated rows, and rows that sum to one."""
    found = {}
    if output.dim() >= 2 and 2 <= output.shape[-1] <= _MOST_CLASSES:
        rows = output.detach().reshape(-1, output.shape[-1])[:_ROWS].float()
        whole = (rows.sum(-1) - 1).abs() < _SUM_TOLERANCE
        found["rows_sum_to_one"] = (whole & (rows >= 0).all(-1)).double().mean()
    first = next((one for one in inputs if one.dim() and not one.is_complex()), None)
    if first is not None and output.dim() >= 1 and len(output) == len(first) and len(first) > 1:
        ours, theirs = _projected(output), _projected(first)
        same = ours[:, None] == ours[None, :]
        other = theirs[:, None] != theirs[None, :]
        found["repeated_rows"] = (same & other).any(1).double().mean()
    return found


def masked_statistics(sequence: Tensor, mask: Tensor, *, batch_first: bool) -> dict[str, Tensor]:
    """Return share of masked positions, and root mean square of the input at masked and kept ones.

    Args:
        sequence: (batch, positions, features), or (positions, batch, features).
        mask: (batch, positions): True, or minus infinity, where a position is masked.
        batch_first: which of the two layouts.
    """
    ordered = sequence.detach() if batch_first else sequence.detach().transpose(0, 1)
    if ordered.dim() != 3 or mask.shape != ordered.shape[:2]:
        return {}
    hidden = mask if mask.dtype is torch.bool else mask < 0
    power = ordered.double().square().mean(-1)
    share = hidden.double()
    tiny = torch.finfo(torch.float64).tiny
    return {
        "masked_fraction": share.mean(),
        "masked_rms": ((power * share).sum() / share.sum().clamp_min(tiny)).sqrt(),
        "kept_rms": ((power * (1 - share)).sum() / (1 - share).sum().clamp_min(tiny)).sqrt(),
    }


def usable(tensor: Tensor) -> bool:
    """Whether statistics make sense: a plain, dense, floating tensor with values."""
    plain = tensor.layout is torch.strided and not hasattr(tensor, "to_local")
    return plain and tensor.is_floating_point() and tensor.numel() > 0 and not tensor.is_meta


def value_sum(tensor: Tensor) -> Tensor:
    """Return the sum of all values, which is not finite where one of them is not: read without a copy."""
    wide = torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
    return tensor.detach().sum(dtype=wide)


def sample_cube(tensor: Tensor) -> Tensor:
    """Return up to 64 rows, 8 positions between and 256 units of a tensor as (rows, positions, units).

    Units are the last dimension, or dimension 1 of tensors with four dimensions and more.
    """
    values = tensor.detach()
    if values.dim() == 0:
        values = values.reshape(1)
    if values.dim() == 1:
        values = values.reshape(-1, 1)
    if values.dim() >= 4:
        values = values.flatten(2).transpose(1, 2)
    elif values.dim() == 2:
        values = values.unsqueeze(1)
    thinned = _thinned(_thinned(_thinned(values, 0, _ROWS), 1, _MIDDLE), 2, _UNITS)
    return thinned.float().contiguous()  # read many times: once with gaps, then side by side


def _thinned(values: Tensor, dim: int, most: int) -> Tensor:
    size = values.shape[dim]
    if size <= most:
        return values
    chosen = values[(slice(None),) * dim + (slice(None, None, size // most),)]
    return chosen.narrow(dim, 0, most)


def _read(found: ModuleSums, side: str, cube: Tensor, tensor: Tensor) -> None:
    """Make the sums of a large cube; set a small one aside."""
    rows, positions, units = cube.shape
    found.sizes[side] = rows, positions * units, units
    if cube.numel() > _SMALL:
        sums = _side_sums(side, cube.unsqueeze(0))
        found.values |= {name: values[0] for name, values in sums.items()}
    else:  # the next module may write over the tensor
        found.cubes[side] = cube.clone() if cube.data_ptr() == tensor.data_ptr() else cube


def add_sums(calls: Sequence[ModuleSums]) -> None:
    """Make the sums of the cubes set aside: most of a model's small layers are alike."""
    kinds: dict[tuple[str, torch.Size, torch.device], list[ModuleSums]] = {}
    for call in calls:
        for side, cube in call.cubes.items():
            kinds.setdefault((side, cube.shape, cube.device), []).append(call)
    for (side, _, _), alike in kinds.items():
        sums = _side_sums(side, torch.stack([call.cubes.pop(side) for call in alike]))
        for name, values in sums.items():
            for call, value in zip(alike, values.unbind(), strict=True):
                call.values[name] = value


def _side_sums(side: str, cubes: Tensor) -> dict[str, Tensor]:
    """Return sums and extremes of cubes (calls, rows, positions, units) by name, one for each call.

    Deviations are from the first row in place of the mean: one pass fewer, and exactly 0 where all rows are
    the same.
    """
    found = {f"{side}_squares": _squares(cubes)}
    if cubes.shape[1] > 1:
        deviation = cubes - cubes[:, :1]
        found[f"{side}_spread_squares"] = _squares(deviation)
        found[f"{side}_spread_sums"] = _squares(deviation.sum(1))
    if side == "output":
        return found | _output_statistics(cubes)
    found["input_lowest"], found["input_highest"] = torch.aminmax(cubes.flatten(1), dim=1)
    return found


def _squares(values: Tensor) -> Tensor:
    flat = values.flatten(1)
    if len(flat) == 1:  # several times as fast
        return torch.dot(flat[0], flat[0]).unsqueeze(0)
    squares: Tensor = torch.linalg.vecdot(flat, flat)
    return squares


def _output_statistics(cubes: Tensor) -> dict[str, Tensor]:
    highest_rows, lowest_rows = cubes.amax(1), cubes.amin(1)  # by position and unit
    highest, lowest = highest_rows.amax(1), lowest_rows.amin(1)
    found = {
        "output_max": highest.amax(1),
        "output_min": lowest.amin(1),
        "nonzero": _count(cubes != 0),
        "alive": _count(torch.logical_or(highest, lowest)),
    }
    if cubes.shape[1] > 1:
        found["constant"] = _count(highest_rows == lowest_rows)
    return found


def _count(where: Tensor) -> Tensor:
    """Return how often it is so in each call, in the dtype of the other sums: one kernel packs them all."""
    return where.flatten(1).sum(1, dtype=torch.float32)


def _interior(padding: Tensor) -> Tensor:
    """Return the share of the padded positions that have others on both sides in their row; 0 without any."""
    others = (~padding).long()
    before = others.cumsum(1) > 0
    after = others.flip(1).cumsum(1).flip(1) > 0
    inside = padding & before & after
    return inside.double().sum() / padding.double().sum().clamp_min(1.0)


def _saturated(cube: Tensor, low: float, high: float) -> Tensor:
    margin = _NEAR_BOUND * (high - low)
    return ((cube < low + margin) | (cube > high - margin)).float().mean()


def _running_statistics(
    module: nn.modules.batchnorm._BatchNorm, tensor: Tensor
) -> dict[str, Tensor]:
    mean, variance = module.running_mean, module.running_var
    if mean is None or variance is None or tensor.dim() < 2:
        return {}
    over = tuple(d for d in range(tensor.dim()) if d != 1)
    own, average = torch.var_mean(tensor.detach().float(), over, correction=0)
    spread = variance.detach().float()
    shift = (average - mean.detach().float()).abs() / (spread + module.eps).sqrt()
    ratio = (own + module.eps) / (spread + module.eps)
    return {"statistics_shift": shift.median(), "statistics_ratio": ratio.median()}


def _projected(tensor: Tensor) -> Tensor:
    """Return one number per row (up to 64): a fixed sum of its values, equal for equal rows."""
    rows = tensor.detach()[:_ROWS].reshape(min(_ROWS, len(tensor)), -1)[:, :_MOST_CLASSES].double()
    weights = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=rows.dtype).sqrt()
    return (rows * weights).sum(1)

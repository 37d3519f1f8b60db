"""Statistics of one tensor of a batch, as pure tensor functions. Sync: none anywhere here."""

from __future__ import annotations

import torch
from torch import Tensor

from gradguard.sampling import wide_dtype

ROWS = 64
"""How many rows of a batch get a fingerprint."""

_VALUES_PER_ROW = 128
_FEATURES = 256
_SHIFTS = (-1, 0, 1, 2)
IGNORED = -100
"""The label that torch's losses leave out by default."""


def row_fingerprints(tensor: Tensor) -> Tensor | None:
    """Return one number for each of the first 64 rows, equal for equal rows; None without rows.

    A fixed sum of up to 128 of its values: rows that differ elsewhere only look equal.
    """
    if not is_readable(tensor) or tensor.dim() == 0 or tensor.device.type == "mps":
        return None  # without float64 different rows would look equal
    rows = _rows(tensor)
    weights = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=rows.dtype).sqrt()
    return (rows.nan_to_num() * weights).sum(1)


def value_statistics(tensor: Tensor) -> dict[str, Tensor]:
    """Return the numbers of a :class:`gradguard.facts.BatchReading` by field, 0-dim each."""
    if not is_readable(tensor) or tensor.numel() == 0:
        return {}
    rows = _rows(tensor)
    found = {
        "minimum": rows.min(),
        "maximum": rows.max(),
        "mean": rows.mean(),
        "std": rows.std(correction=0),
        "zero_fraction": (rows == 0).double().mean(),
    }
    if tensor.is_floating_point():
        found["nonfinite"] = (~tensor.detach().isfinite()).sum()
        found |= _features(tensor)
    else:
        found |= _labels(tensor, rows)
    if len(rows) > 1:
        found["constant_features"] = (rows.amax(0) == rows.amin(0)).double().mean()
    return found


def pair_statistics(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return how far targets can be read off the inputs, by field or as ``shift:N``, 0-dim each.

    Args:
        inputs: first tensor that the model was given.
        targets: of the same batch.
    """
    if not (is_readable(inputs) and is_readable(targets)) or not (inputs.dim() and targets.dim()):
        return {}
    if len(inputs) != len(targets) or inputs.device != targets.device:
        return {}
    integers = not inputs.is_floating_point() and not targets.is_floating_point()
    if integers and inputs.shape == targets.shape and inputs.dim() == 2:
        return {f"shift:{by}": _match(inputs, targets, by) for by in _SHIFTS}
    if not inputs.is_floating_point() or len(inputs) < 8:
        return {}
    left, right = _rows(inputs)[:, :_FEATURES], _rows(targets)[:, :8]
    found = {"input_correlation": _correlation(left, right)}
    if targets.is_floating_point():
        verbatim = (left[:, :, None] == right[:, None, :]).any(1) & (right != 0)
        found["input_equal"] = verbatim.double().mean()
    return found


def is_readable(tensor: Tensor) -> bool:
    """Whether it holds plain, dense, real numbers."""
    plain = tensor.layout is torch.strided and not hasattr(tensor, "to_local")
    return plain and not tensor.is_meta and not tensor.is_quantized


def _rows(tensor: Tensor) -> Tensor:
    """Return up to 64 rows with up to 128 evenly spaced values each, in wide precision."""
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    values = values[:ROWS] if values.dim() else values.reshape(1)
    flat = values.reshape(len(values), -1)
    stride = max(1, -(-flat.shape[1] // _VALUES_PER_ROW))
    return flat[:, ::stride][:, :_VALUES_PER_ROW].to(wide_dtype(flat.device))


def _features(tensor: Tensor) -> dict[str, Tensor]:
    """Return how far apart the scales of the features (last dimension) are."""
    if tensor.dim() < 2 or not 2 <= tensor.shape[-1] <= 4096 or len(tensor) < 2:
        return {}
    rows = tensor.detach()[: 4 * ROWS].reshape(-1, tensor.shape[-1])[: 4 * ROWS].double()
    spread, scale = rows.std(0, correction=0), rows.square().mean(0).sqrt()
    return {
        "feature_spread": _ratio(spread),
        "feature_scale": _ratio(scale),
    }


def _ratio(values: Tensor) -> Tensor:
    """Return largest over smallest of the values above 0; 0 without any."""
    positive = values > 0
    smallest = torch.where(positive, values, torch.inf).min()
    return torch.where(positive.any(), values.max() / smallest, 0.0)


def _labels(tensor: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Return what is asked of integers: the most common value, how many there are, their order."""
    flat = rows.reshape(-1)[:1024]
    equal = flat[:, None] == flat[None, :]
    counts = equal.sum(1)
    first = (torch.tril(equal, -1).sum(1) == 0).sum()
    found = {
        "top_share": counts.max() / len(flat),
        "top_value": flat[counts.argmax()],
        "distinct": first,
        "ignored_fraction": (tensor.detach() == IGNORED).double().mean(),
    }
    if rows.shape[1] == 1 and len(rows) > 1:
        found["sorted_rows"] = (rows[1:, 0] >= rows[:-1, 0]).double().mean()
    return found


def _match(inputs: Tensor, targets: Tensor, by: int) -> Tensor:
    """Return the share of positions where ``targets[:, i]`` equals ``inputs[:, i + by]``."""
    length = inputs.shape[1] - abs(by)
    if length < 1:
        return torch.zeros((), device=inputs.device)
    left = inputs[:, max(0, by) : max(0, by) + length]
    right = targets[:, max(0, -by) : max(0, -by) + length]
    counted = right != IGNORED
    return ((left == right) & counted).double().sum() / counted.sum().clamp_min(1)


def _correlation(left: Tensor, right: Tensor) -> Tensor:
    """Return the largest absolute Pearson correlation of a column of one with a column of the other."""
    left, right = left - left.mean(0), right - right.mean(0)
    tiny = torch.finfo(left.dtype).tiny
    left = left / left.norm(dim=0).clamp_min(tiny)
    right = right / right.norm(dim=0).clamp_min(tiny)
    return (left.T @ right).abs().max()

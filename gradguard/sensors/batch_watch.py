"""Reads batches: what the model is given, what its output is compared with, and what loaders yield."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradguard.facts import BatchReading
from gradguard.sensors.batch_stats import (
    ROWS,
    is_readable,
    pair_statistics,
    row_fingerprints,
    value_statistics,
)
from gradguard.sensors.hooks import tensors_in
from gradguard.sensors.pending import FactQueue, Found

TRAIN = "train"
_FINGERPRINTED = 64
"""How many batches of a split get fingerprints; afterwards detailed steps only."""

_TARGET_KEYS = ("targets", "target", "labels", "label", "y")
_INTEGERS = ("nonfinite", "distinct")


class BatchWatch:
    """Queues one reading per tensor of a batch.

    Args:
        queue: takes the readings.
        step: gives the number of attempts so far.
        detailed: says whether the step under way is measured in detail.
    """

    def __init__(
        self, queue: FactQueue, *, step: Callable[[], int], detailed: Callable[[], bool]
    ) -> None:
        self._queue, self._step, self._detailed = queue, step, detailed
        self._read: dict[tuple[str, str], int] = {}
        self._inputs: Tensor | None = None

    def given(self, inputs: list[Tensor]) -> None:
        """Read what a training forward was given. Sync: none."""
        self._inputs = None
        if self._is_due(TRAIN, "forward"):
            self._read_given(inputs)

    @torch.no_grad()
    def _read_given(self, inputs: list[Tensor]) -> None:
        for index, one in enumerate(inputs[:2]):
            self._put(_name("inputs", index), one, split=TRAIN, source="forward")
        if self._detailed() and inputs and is_readable(inputs[0]) and inputs[0].dim():
            self._inputs = inputs[0].detach()[:ROWS].clone()  # the caller may write over it

    @torch.no_grad()
    def compared(self, targets: Any) -> None:
        """Read what the output of the last forward is compared with. Sync: none."""
        if not self._is_due(TRAIN, "observe"):
            return
        for index, one in enumerate(tensors_in(targets, most=2)):
            pair = self._inputs if index == 0 else None
            self._put(_name("targets", index), one, split=TRAIN, source="observe", inputs=pair)

    @torch.no_grad()
    def loaded(self, batch: Any, split: str) -> None:
        """Read a batch that a loader yields. Sync: none."""
        if not self._is_due(split, "loader"):
            return
        inputs, targets = parts_of(batch)
        for index, one in enumerate(inputs[:2]):
            self._put(_name("inputs", index), one, split=split, source="loader")
        for index, one in enumerate(targets[:2]):
            first = inputs[0] if index == 0 and inputs else None
            self._put(_name("targets", index), one, split=split, source="loader", inputs=first)

    def forget(self) -> None:
        """Let go of the inputs kept for their targets."""
        self._inputs = None

    def _is_due(self, split: str, source: str) -> bool:
        seen = self._read.get((split, source), 0)
        self._read[split, source] = seen + 1
        told_already = source == "forward" and (split, "loader") in self._read
        if told_already or seen >= _FINGERPRINTED:
            return split == TRAIN and self._detailed()
        return True

    def _put(
        self, name: str, tensor: Tensor, *, split: str, source: str, inputs: Tensor | None = None
    ) -> None:
        values = {}
        rows = row_fingerprints(tensor)
        if rows is not None:
            values["rows"] = rows
        if self._detailed() or split != TRAIN:
            values |= value_statistics(tensor)
            if inputs is not None:
                values |= pair_statistics(inputs, tensor[:ROWS] if tensor.dim() else tensor)
        host = {
            "step": self._step(),
            "split": split,
            "tensor": name,
            "source": source,
            "shape": tuple(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        self._queue.put(partial(_reading, host), values)


def parts_of(batch: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return inputs and targets of a batch.

    Of a mapping, what is called labels or targets; of a tuple or list, the last part; else all are inputs.
    """
    if isinstance(batch, Mapping):
        goal = next((key for key in _TARGET_KEYS if key in batch), None)
        rest = [value for key, value in batch.items() if key != goal]
        return tensors_in(rest), [] if goal is None else tensors_in(batch[goal])
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return tensors_in(batch[:-1]), tensors_in(batch[-1])
    return tensors_in(batch), []


def _name(kind: str, index: int) -> str:
    return kind if index == 0 else f"{kind}[{index}]"


def _reading(host: dict[str, Any], found: Found) -> BatchReading:
    numbers: dict[str, Any] = {
        key: int(values[0]) if key in _INTEGERS else values[0]
        for key, values in found.items()
        if key != "rows" and not key.startswith("shift:")
    }
    rows = found.get("rows")
    shifts = {
        key.removeprefix("shift:"): values[0]
        for key, values in found.items()
        if key.startswith("shift:")
    }
    return BatchReading(
        **host,
        rows=None if rows is None else tuple(float(f"{row:.9g}") for row in rows),
        shift_match=shifts,
        **numbers,
    )

"""The sync lint sees what makes the host wait, and nothing else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from gradguard.testing.lint import HostReads, assert_no_host_reads, count_host_reads

X = torch.tensor([1.0, -2.0, 3.0])

WAITING = {
    "item": (lambda: X.sum().item(), "aten::_local_scalar_dense"),
    "float": (lambda: float(X[0]), "aten::_local_scalar_dense"),
    "bool": (lambda: bool(X[0] > 0), "aten::_local_scalar_dense"),
    "format": (lambda: f"{X[0]:.3f}", "aten::_local_scalar_dense"),
    "range": (lambda: range(torch.tensor(2)), "aten::_local_scalar_dense"),
    "tensor as an index": (lambda: X[torch.tensor(1)], "aten::_local_scalar_dense"),
    "nonzero": (lambda: X.nonzero(), "aten::nonzero"),
    "where with one argument": (lambda: torch.where(X > 0), "aten::nonzero"),
    "boolean mask": (lambda: X[X > 0], "aten::index"),
    "masked_select": (lambda: X.masked_select(X > 0), "aten::masked_select"),
    "unique": (lambda: X.unique(), "aten::_unique2"),
    "equal": (lambda: torch.equal(X, X), "aten::equal"),
    "allclose": (lambda: torch.allclose(X, X), "aten::allclose"),
    "repeat_interleave": (
        lambda: torch.repeat_interleave(torch.tensor([1, 2])),
        "aten::repeat_interleave",
    ),
    "tolist": (lambda: X.tolist(), "Tensor.tolist"),
    "numpy": (lambda: X.numpy(), "Tensor.numpy"),
    "asarray": (lambda: np.asarray(X), "Tensor.__array__"),
    "cpu": (lambda: X.cpu(), "Tensor.cpu"),
    "repr": (lambda: repr(X), "Tensor.__repr__"),
    "str in a message": (lambda: f"{X}", "Tensor.__format__"),
}

FREE = {
    "arithmetic": lambda: (X * 2 + 1).exp().clamp(max=1.0),
    "reductions": lambda: (X.isfinite().all(), X.norm(), X.isnan().sum()),
    "foreach": lambda: torch.stack(torch._foreach_norm([X, X])),
    "where": lambda: torch.where(X > 0, X, 0.0),
    "nan_to_num": lambda: X.clone().nan_to_num_(0.0),
    "integer indices": lambda: X[torch.tensor([0, 2])],
    "slices": lambda: X[1:].clone(),
    "shape and dtype": lambda: (X.shape, X.dtype, X.device, len(X)),
    "sized repeat_interleave": lambda: torch.repeat_interleave(torch.tensor([1, 2]), output_size=3),
    "backward": lambda: torch.zeros(3, requires_grad=True).sum().backward(),
}


@pytest.mark.parametrize("name", WAITING)
def test_every_waiting_operation_is_seen_once(name: str) -> None:
    """Each operation that needs a value on the host is counted exactly once, under its own name."""
    function, operation = WAITING[name]
    assert count_host_reads(function) == Counter({operation: 1})


@pytest.mark.parametrize("name", FREE)
def test_operations_that_stay_on_the_device_are_free(name: str) -> None:
    """Work that a device can do without the host is never counted."""
    assert count_host_reads(FREE[name]) == Counter()


def test_assigning_through_a_mask_is_seen() -> None:
    """Writing through a boolean mask needs the mask's values and is counted."""
    y = X.clone()

    def assign() -> None:
        y[y > 0] = 0.0

    assert count_host_reads(assign) == Counter({"aten::index_put_": 1})


def test_values_that_left_by_a_non_blocking_copy_are_host_memory() -> None:
    """A buffer filled by a non-blocking copy is host memory, and so is a view of it."""
    host = torch.empty(3)

    def leave() -> None:
        host.copy_(X * 2, non_blocking=True)
        assert host.tolist() == [2.0, -4.0, 6.0]
        assert float(host[0]) == 2.0

    assert count_host_reads(leave) == Counter()
    assert count_host_reads(host.tolist) == Counter({"Tensor.tolist": 1}), "ends with the block"


def test_only_the_device_in_question_counts() -> None:
    """With device="cuda", reading a CPU tensor is no wait."""
    with HostReads(device="cuda") as lint:
        X.sum().item()
        X.tolist()
    assert lint.reads == []


def test_a_read_names_its_line() -> None:
    """Each read says which line of the caller made it, not which line inside torch."""
    with HostReads() as lint:
        X.unique()
    (read,) = lint.reads
    assert __file__ in read.where


def test_the_lint_stops_after_an_exception() -> None:
    """An exception leaves no mode behind."""
    with pytest.raises(KeyError), HostReads() as lint:
        raise KeyError
    X.sum().item()
    assert lint.reads == []


def test_assertion_names_the_surplus() -> None:
    """The failure names the operation, the number above the allowance and the line."""
    with pytest.raises(AssertionError, match=r"_local_scalar_dense makes .* 2 time\(s\) more") as e:
        assert_no_host_reads(
            lambda: [X[0].item() for _ in range(3)], allowed={"aten::_local_scalar_dense": 1}
        )
    assert __file__ in str(e.value)


def test_allowed_reads_pass() -> None:
    """Reads of the work itself, given as the allowance, are nobody's fault."""
    work = lambda: X[X > 0].sum().item()  # noqa: E731
    assert_no_host_reads(work, allowed=count_host_reads(work))


@pytest.mark.parametrize(
    ("call", "reads"),
    [("unscale_", 0), ("clip", 0), ("step", 3), ("update", 0), ("get_scale", 1)],
)
def test_known_costs_of_the_loss_scaler(call: str, reads: int) -> None:
    """A GradScaler reads the host where its documentation says so: in step and get_scale."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    calls = {
        "unscale_": lambda: scaler.unscale_(optimizer),
        "clip": lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "step": lambda: scaler.step(optimizer),
        "update": scaler.update,
        "get_scale": scaler.get_scale,
    }
    for name, function in calls.items():
        counted = count_host_reads(function).total()
        if name == call:
            assert counted == reads


def test_a_fused_step_reads_nothing() -> None:
    """A fused optimizer decides on the device: its scaler step is free of host reads."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    assert_no_host_reads(lambda: scaler.step(optimizer))

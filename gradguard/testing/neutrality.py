"""The neutrality check: training with an observer must be bit-identical to training without it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.amp import GradScaler

Optimizers = Optimizer | Mapping[str, Optimizer]
"""One optimizer, or several by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A small training run that can be repeated from its start.

    Attributes:
        model: the model that is trained.
        optimizers: one optimizer or a mapping from names to optimizers.
        step: does one training step; it is given what ``observe`` yields, or None in the bare run.
        scaler: the loss scaler, if there is one.
    """

    model: nn.Module
    optimizers: Optimizers
    step: Callable[[Any], object]
    scaler: GradScaler | None = None


def training_fingerprint(
    model: nn.Module, optimizers: Optimizers, scaler: GradScaler | None = None
) -> str:
    """Return a hash of everything that the next training step depends on, as 64 hex digits.

    It covers, bit by bit, parameters, gradients, buffers (also non-persistent ones), train or eval
    mode, optimizer state and options, the scaler's state, grad mode, and the global random state of
    Python, NumPy and torch on every device in use.

    Sync: copies everything to the host.

    Raises:
        TypeError: the optimizer holds a value of a kind that has no defined bits.
    """
    total = hashlib.sha256()
    for name, digest in fingerprint_parts(model, optimizers, scaler).items():
        total.update(f"{name}={digest};".encode())
    return total.hexdigest()


def fingerprint_parts(
    model: nn.Module, optimizers: Optimizers, scaler: GradScaler | None = None
) -> dict[str, str]:
    """Return the parts of :func:`training_fingerprint` by name, such as ``"parameter 0.weight"``.

    Sync: copies everything to the host.
    """
    # Likely causes first: a difference is reported from the top of this list.
    parts: dict[str, object] = {
        f"{name} random state": str(state) if name == "Python" else state
        for name, state in _random_states().items()
    }
    parts["grad mode"] = torch.is_grad_enabled()
    for name, module in model.named_modules():
        parts[f"train mode of {name or 'the model'}"] = module.training
    for name, parameter in model.named_parameters():
        parts[f"parameter {name}"] = parameter
        parts[f"gradient of {name}"] = parameter.grad
    parts |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    for name, optimizer in named_optimizers(optimizers).items():
        parts[f"state of optimizer {name}"] = optimizer.state_dict()
    if scaler is not None:
        parts["state of the scaler"] = scaler.state_dict()
    return {name: _digest(value) for name, value in parts.items()}


def assert_neutral(
    make_run: Callable[[], TrainingRun],
    observe: Callable[[TrainingRun], AbstractContextManager[object]],
    *,
    steps: int = 25,
    seed: int = 0,
) -> None:
    """Train twice, bare and observed, and fail unless both end in the same bits.

    The global random generators are seeded before each run and put back afterwards.

    Args:
        make_run: builds the run from nothing, so that each call starts at the same weights and
            data.
        observe: attaches what is to be judged; a context manager around all steps whose value goes
            to ``TrainingRun.step``.
        steps: training steps per run.
        seed: seed of all global random generators.

    Raises:
        AssertionError: naming every part that differs; or that the bare run, repeated, differs from
            itself, so that nothing can be said about the observer.
    """
    bare = _train(make_run, lambda _: nullcontext(), steps, seed)
    observed = _train(make_run, observe, steps, seed)
    if observed == bare:
        return
    again = _train(make_run, lambda _: nullcontext(), steps, seed)
    if again != bare:
        raise AssertionError(
            f"the bare run is not repeatable: {_difference(bare, again)} after {steps} steps of "
            "the same seed; build everything inside make_run and use deterministic algorithms"
        )
    raise AssertionError(
        f"the training was changed: {_difference(bare, observed)} after {steps} steps"
    )


def named_optimizers(optimizers: Optimizers) -> Mapping[str, Optimizer]:
    """Return the optimizers by name; a single one is called ``"optimizer"``."""
    return {"optimizer": optimizers} if isinstance(optimizers, Optimizer) else optimizers


def seed_everything(seed: int) -> None:
    """Seed the global random generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the global random state back at the end of the block, however it ends."""
    states = _random_states()
    try:
        yield
    finally:
        random.setstate(states["Python"])
        np.random.set_state(states["NumPy"])
        torch.set_rng_state(states["torch"])
        for name, state in states.items():
            if name.startswith("cuda"):
                torch.cuda.set_rng_state(state, name)


def _train(
    make_run: Callable[[], TrainingRun],
    observe: Callable[[TrainingRun], AbstractContextManager[object]],
    steps: int,
    seed: int,
) -> dict[str, str]:
    with preserved_random_state():
        seed_everything(seed)
        run = make_run()
        with observe(run) as observer:
            for _ in range(steps):
                run.step(observer)
        return fingerprint_parts(run.model, run.optimizers, run.scaler)


def _random_states() -> dict[str, Any]:
    states = {
        "Python": random.getstate(),
        "NumPy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # asking earlier would initialise CUDA, which is a trace
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda:{index}"] = state
    return states


def _difference(one: Mapping[str, str], other: Mapping[str, str], *, shown: int = 6) -> str:
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more} differ"


def _digest(value: object) -> str:
    total = hashlib.sha256()
    for piece in _pieces(value):
        total.update(len(piece).to_bytes(8, "big") + piece)
    return total.hexdigest()


def _pieces(value: object) -> Iterator[bytes]:
    """Yield the bits of a value: its kind first, then its content."""
    yield type(value).__name__.encode()
    if isinstance(value, Tensor | np.ndarray):
        yield from _tensor_pieces(torch.as_tensor(value))
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _pieces(key)
            yield from _pieces(entry)
    elif isinstance(value, Sequence | AbstractSet) and not isinstance(value, str | bytes):
        for entry in sorted(value) if isinstance(value, AbstractSet) else value:
            yield from _pieces(entry)
    elif isinstance(value, float):
        yield value.hex().encode()
    elif value is None or isinstance(value, str | bytes | int | complex):
        yield repr(value).encode()
    else:
        raise TypeError(
            f"cannot take a fingerprint of a {type(value).__qualname__}: it has no defined bits; "
            "keep only tensors, numbers, strings and containers of them in optimizer state"
        )


def _tensor_pieces(tensor: Tensor) -> Iterator[bytes]:
    tensor = tensor.detach()
    yield f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode()
    if hasattr(tensor, "to_local"):  # DTensor: this rank's shard
        tensor = tensor.to_local()
    if tensor.layout == torch.strided:
        plain = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        yield plain.view(torch.uint8).numpy().tobytes()
    else:
        for part in _sparse_parts(tensor):
            yield from _tensor_pieces(part)


def _sparse_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()  # noqa: SLF001  (as they are: no coalescing)
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return tensor.crow_indices(), tensor.col_indices(), tensor.values()

"""A block of code after which model, optimizers and random state are as before, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

Undo = Callable[[], None]


@contextmanager
def undisturbed(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Iterator[None]:
    """Put everything back when the block ends, however it ends.

    Restored: values of parameters and buffers (in place, so that tied weights and optimizers still see the
    same tensors), which tensors the modules hold, ``requires_grad``, ``.grad`` (the same tensor with the same
    content, or None), train or eval mode of every module, state and groups of the optimizers, random state
    (torch on the CPU and on initialised CUDA devices, Python, NumPy) and grad mode. Not restored: plain Python
    attributes of modules, data loaders, loss scalers, schedulers and files.

    Costs a copy of all of that while the block runs.

    Args:
        model: its modules, parameters and buffers are restored.
        optimizers: their state, groups and parameters are restored, too.

    Raises:
        ValueError: a parameter or buffer has no shape yet (lazy modules).

    Sync: copies the random state of CUDA devices to the host; nothing otherwise.
    """
    chosen = tuple(optimizers)
    with ExitStack() as undo:
        undo.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        for back in (*_random_state(), *_optimizers(chosen), *_tensors(model, chosen)):
            undo.callback(back)
        for module in model.modules():  # called first on the way out: which tensors a module holds
            undo.callback(_module(module))
        yield


def _random_state() -> Iterator[Undo]:
    """Yield what sets the random generators back."""
    on_cpu, in_python, in_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield lambda: torch.set_rng_state(on_cpu)
    yield lambda: random.setstate(in_python)
    yield lambda: np.random.set_state(in_numpy)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        on_cuda = torch.cuda.get_rng_state_all()
        yield lambda: torch.cuda.set_rng_state_all(on_cuda)


def _module(module: nn.Module) -> Undo:
    """Return what gives a module its mode and its registered tensors and modules back."""
    training = module.training
    held = vars(module)
    names = ("_parameters", "_buffers", "_modules")
    # A scripted module's registries are views of another kind, which cannot be exchanged.
    before = {name: dict(held[name]) for name in names if isinstance(held.get(name), dict)}

    def back() -> None:
        for name, entries in before.items():
            held[name].clear()
            held[name].update(entries)
        module.training = training

    return back


def _tensors(model: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[Undo]:
    """Yield what gives every parameter and buffer its value and gradient back."""
    grouped = (p for one in optimizers for group in one.param_groups for p in group["params"])
    every = {id(one): one for one in (*model.parameters(), *model.buffers(), *grouped)}
    for one in every.values():
        if is_lazy(one):
            raise ValueError(
                f"keeping the values of {type(model).__name__}: a lazy parameter has no shape yet; "
                "run one forward pass first"
            )
        yield _leaf(one) if one.is_leaf else _value(one)


def _leaf(tensor: Tensor) -> Undo:
    """Return what gives a leaf its value, ``requires_grad`` and gradient back."""
    value, requires_grad, gradient = _value(tensor), tensor.requires_grad, tensor.grad
    content = None if gradient is None else _value(gradient)

    def back() -> None:
        tensor.grad = None  # else torch refuses a changed dtype or device
        value()
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.requires_grad_(requires_grad)
        if content is not None:
            content()
        tensor.grad = gradient

    return back


def _value(tensor: Tensor) -> Undo:
    """Return what writes the value back into the same memory; versions seen by autograd do not change."""
    memory = tensor.data
    copy = memory.clone()

    @torch.no_grad()
    def back() -> None:
        if (
            memory.layout != torch.strided
        ):  # its .data is a tensor of its own: the memory is not shared
            tensor.copy_(copy)
            return
        if _moved(tensor, memory):
            tensor.data = memory
        if not _overlaps(memory):
            memory.copy_(copy)

    return back


def _moved(tensor: Tensor, memory: Tensor) -> bool:
    """Whether the tensor has been given other memory since (``.data =``, ``.to()``, ``resize_``)."""
    if tensor.dtype != memory.dtype or tensor.device != memory.device:
        return True
    if tensor.shape != memory.shape:
        return True
    if type(memory) is not Tensor:
        return False  # subclasses do not always tell where their memory is
    return tensor.data_ptr() != memory.data_ptr() or tensor.stride() != memory.stride()


def _overlaps(memory: Tensor) -> bool:
    """Whether several elements share one place, as after ``expand``: torch refuses to write to these."""
    return any(s == 0 and n > 1 for s, n in zip(memory.stride(), memory.shape, strict=True))


def _optimizers(optimizers: Iterable[Optimizer]) -> Iterator[Undo]:
    """Yield what gives every optimizer its state, groups and counters back."""
    for optimizer in optimizers:
        yield _content(optimizer.state)
        yield _content(optimizer.param_groups)
        yield _counters(optimizer)


def _content(value: Any) -> Undo:
    """Return what restores tensors, dictionaries and lists in place, as deep as they go."""
    if isinstance(value, Tensor):
        return _value(value)
    if isinstance(value, dict):
        entries = dict(value)
        inner = [_content(one) for one in entries.values() if _is_mutable(one)]
    elif isinstance(value, list):
        entries = dict(enumerate(value))
        inner = [_content(one) for one in value if _is_mutable(one)]
    else:
        return lambda: None

    def back() -> None:
        value.clear()
        if isinstance(value, dict):
            value.update(entries)
        else:
            value.extend(entries.values())
        for one in inner:
            one()

    return back


def _is_mutable(value: object) -> bool:
    """Whether a value can change in place; parameters in a group are restored elsewhere."""
    return isinstance(value, (Tensor, dict, list)) and not isinstance(value, nn.Parameter)


def _counters(optimizer: Optimizer) -> Undo:
    """Return what restores plain attributes, such as the mark a scheduler leaves for the first step."""
    simple = (bool, int, float, str, type(None))
    held = vars(optimizer)
    before = {name: value for name, value in held.items() if isinstance(value, simple)}

    def back() -> None:
        for name in [name for name, value in held.items() if isinstance(value, simple)]:
            if name not in before:
                del held[name]
        held.update(before)

    return back

"""Where the user's code stands while torch runs an operation: file, line and module, read off the stack.

The stack is only read: no hook is registered on any module.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import linecache
import os
import weakref
from types import CodeType, FrameType
from typing import NamedTuple

import torch
from torch import nn

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_STANDARD = (copy.__file__, contextlib.__file__, functools.__file__)  # they call torch for the user
_CALL: CodeType = nn.Module._call_impl.__code__  # noqa: SLF001 (every call of a module has this frame)


class Spot(NamedTuple):
    """A place in the user's code as it was found: nothing is formatted before it is needed.

    ``module`` is the dotted path of the innermost module of the model that was being called, "" for the
    model itself, None outside of it. ``function_line`` is where the function around ``number`` begins.
    """

    file: str
    number: int
    module: str | None
    function_line: int


class Place(NamedTuple):
    """The same place as it is shown: module, ``"file.py:48"`` and the text of that line."""

    module: str | None = None
    line: str | None = None
    source: str | None = None


class Modules:
    """Dotted paths of the modules of a model, which is not kept alive."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._model = weakref.ref(model)

    def path_of(self, module: object) -> str | None:
        """Return the path; None for a module that is not part of the model."""
        return self._paths.get(id(module)) if self._model() is not None else None


def current_spot(modules: Modules) -> Spot | None:
    """Return the innermost line outside of torch and gradguard that is being run; None for none."""
    frame = inspect.currentframe()
    spot: tuple[str, int, int] | None = None
    module: str | None = None
    while frame is not None and (spot is None or module is None):
        if frame.f_code is _CALL:
            module = modules.path_of(frame.f_locals.get("self")) if module is None else module
        elif spot is None and _is_users(frame):
            code = frame.f_code
            spot = code.co_filename, frame.f_lineno, code.co_firstlineno
        frame = frame.f_back
    return None if spot is None else Spot(spot[0], spot[1], module, spot[2])


def _is_users(frame: FrameType) -> bool:
    return not frame.f_code.co_filename.startswith((_TORCH, _HERE, *_STANDARD))


def describe(spot: Spot | None) -> Place:
    """Format a spot: the file relative to the working directory if it lies inside, else its bare name."""
    if spot is None:
        return Place()
    inside = os.path.abspath(spot.file).startswith(os.getcwd() + os.sep)
    file = os.path.relpath(spot.file) if inside else os.path.basename(spot.file)
    source = linecache.getline(spot.file, spot.number).strip()
    return Place(spot.module, f"{file}:{spot.number}", source or None)


def last_line_with(spot: Spot | None, words: tuple[str, ...]) -> Spot | None:
    """Return the nearest line at or above ``spot``, in the same function, that holds one of ``words``.

    For what torch does without telling a function mode, such as wrapping a tensor in a Parameter.
    """
    if spot is None:
        return None
    for number in range(spot.number, spot.function_line - 1, -1):
        text = linecache.getline(spot.file, number)
        if any(word in text for word in words):
            return spot._replace(number=number)
    return spot

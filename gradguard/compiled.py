"""Whether a model runs as compiled code: hooks on its parts would have it compiled anew."""

from __future__ import annotations

import gc
import sys

import torch
from torch import nn


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or a part of it is compiled, as far as the model itself tells. Sync: none."""
    kinds = (torch.jit.ScriptModule, *_wrappers())
    return any(
        isinstance(module, kinds) or vars(module).get("_compiled_call_impl") is not None
        for module in model.modules()
    )


def has_compiled_wrapper(model: nn.Module) -> bool:
    """Whether ``torch.compile(model)`` was called on it: the wrapper knows the model, not the reverse.

    Looks through all live objects, which takes some tens of milliseconds; ask once. Sync: none.
    """
    wrappers = _wrappers()
    if not wrappers:
        return False
    parts = {id(module) for module in model.modules()}
    found = (one for one in gc.get_objects() if type(one) in wrappers)
    return any(id(vars(one)["_modules"].get("_orig_mod")) in parts for one in found)


def _wrappers() -> tuple[type, ...]:
    """Return torch's class of compiled wrappers; empty when its module was never loaded."""
    frame = sys.modules.get("torch._dynamo.eval_frame")
    return () if frame is None else (frame.OptimizedModule,)

"""Reads what a training loop consists of: parameters, modules and parameter groups as plain values.

Nothing is run to find out: attributes are looked up where modules keep them, because a property or a
parametrization may compute, and some of these (spectral norm) write buffers when they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradguard.compiled import is_compiled
from gradguard.facts import GroupFacts, ModuleFacts, ParameterFacts, Plan, Setup
from gradguard.inventory_hidden import hidden_places
from gradguard.inventory_values import ParameterValues, is_known, read_values

_MODULE_SETTINGS = (
    "p",
    "momentum",
    "eps",
    "affine",
    "track_running_stats",
    "padding_idx",
    "in_features",
    "out_features",
    "num_features",
    "num_embeddings",
    "inplace",
)
_GROUP_SETTINGS = (
    "lr",
    "weight_decay",
    "momentum",
    "eps",
    "maximize",
    "fused",
    "amsgrad",
    "initial_lr",
)


def read_setup(
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    *,
    step: int,
    scaler: bool,
    plan: Plan | None,
    values: bool = True,
) -> Setup:
    """Return the model and its optimizers as they are now; ``schedulers`` is left empty.

    Args:
        model: the watched model.
        optimizers: the innermost optimizers by name.
        step: number of attempts before the one under way.
        scaler: whether an enabled loss scaler is watched.
        plan: what the user declared.
        values: whether to read the values of the parameters, too.

    Sync: with ``values``, see :func:`~gradguard.inventory_values.read_values`; without, none but for
    hyper-parameters that are kept as tensors on an accelerator.
    """
    foreign = _foreign_parameters(model, optimizers)
    wanted = _left_out_shapes(model, optimizers)
    rank, world = _place_among_processes()
    return Setup(
        step=step,
        model=type(model).__name__,
        parameters=_read_parameters(model, optimizers, values=values),
        modules=tuple(_read_module(name, module) for name, module in model.named_modules()),
        groups=_read_groups(optimizers),
        unregistered=hidden_places(model),
        foreign={name: len(shapes) for name, shapes in foreign.items()},
        foreign_same_shape={
            name: sum(shape in wanted for shape in shapes) for name, shapes in foreign.items()
        },
        scaler=scaler,
        compiled=is_compiled(model),
        plan=plan,
        rank=rank,
        world=world,
    )


# --- parameters --------------------------------------------------------------------------------


def _read_parameters(
    model: nn.Module, optimizers: Mapping[str, Optimizer], *, values: bool
) -> tuple[ParameterFacts, ...]:
    parameters = dict(model.named_parameters())
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    kinds = {n: type(m).__name__ for n, m in model.named_modules(remove_duplicate=False)}
    homes = _homes(optimizers)
    measured = read_values(parameters) if values else {}
    facts = []
    for name, parameter in parameters.items():
        optimizer, group = homes.get(id(parameter), (None, None))
        owner = name.rpartition(".")[0]
        read = measured.get(name, ParameterValues())
        facts.append(
            ParameterFacts(
                name=name,
                shape=_shape(parameter),
                dtype=str(parameter.dtype).removeprefix("torch."),
                trainable=parameter.requires_grad,
                optimizer=optimizer,
                group=group,
                module=owner,
                module_kind=kinds.get(owner, ""),
                rms=read.rms,
                max_abs=read.max_abs,
                zero_fraction=read.zero_fraction,
                distinct_rows=read.distinct_rows,
                nonfinite=read.nonfinite,
                tied_to=tuple(other for other in aliases[id(parameter)] if other != name),
                equal_to=read.equal_to,
                foreign_hooks=_foreign_hooks(parameter),
            )
        )
    return tuple(facts)


def _homes(optimizers: Mapping[str, Optimizer]) -> dict[int, tuple[str, int]]:
    """Return by id the first optimizer and group that hold a parameter."""
    homes: dict[int, tuple[str, int]] = {}
    for name, optimizer in optimizers.items():
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                homes.setdefault(id(parameter), (name, index))
    return homes


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape; ``(0,)`` while a lazy module does not know it yet."""
    return tuple(int(size) for size in tensor.shape) if is_known(tensor) else (0,)


def _foreign_hooks(parameter: Tensor) -> int:
    """Return how many tensor hooks are on it that this library did not put there."""
    # torch has no public way to ask; a tensor that was never hooked has None.
    hooks = getattr(parameter, "_backward_hooks", None)
    return 0 if not hooks else sum(not _is_ours(hook) for hook in list(hooks.values()))


def _is_ours(hook: object) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or ""
    return str(module).split(".", 1)[0] == __name__.split(".", 1)[0]


# --- modules -----------------------------------------------------------------------------------


def _read_module(name: str, module: nn.Module) -> ModuleFacts:
    kept = vars(module)
    settings = {
        key: float(kept[key]) for key in _MODULE_SETTINGS if isinstance(kept.get(key), int | float)
    }
    registered = kept.get("_parameters") or {}
    if "bias" in registered:
        settings["bias"] = float(registered["bias"] is not None)
    elif isinstance(kept.get("bias"), bool):  # recurrent layers keep the switch
        settings["bias"] = float(kept["bias"])
    return ModuleFacts(
        name=name, kind=type(module).__name__, training=module.training, settings=settings
    )


# --- optimizers --------------------------------------------------------------------------------


def _read_groups(optimizers: Mapping[str, Optimizer]) -> tuple[GroupFacts, ...]:
    return tuple(
        GroupFacts(
            optimizer=name,
            index=index,
            kind=type(optimizer).__name__,
            parameters=len(group["params"]),
            settings=_group_settings(group),
        )
        for name, optimizer in optimizers.items()
        for index, group in enumerate(optimizer.param_groups)
    )


def _group_settings(group: Mapping[str, object]) -> dict[str, float]:
    found = {key: group.get(key) for key in _GROUP_SETTINGS}
    betas = group.get("betas")
    if isinstance(betas, list | tuple):
        found |= {f"beta{place}": beta for place, beta in enumerate(betas[:2], start=1)}
    numbers = {key: _number(value) for key, value in found.items()}
    return {key: number for key, number in numbers.items() if number is not None}


def _number(value: object) -> float | None:
    """Return a number or one-element tensor as a float, anything else as None."""
    if isinstance(value, Tensor):
        readable = value.numel() == 1 and not value.is_meta and not value.is_complex()
        return float(value.detach()) if readable else None
    return float(value) if isinstance(value, int | float) else None


def _foreign_parameters(
    model: nn.Module, optimizers: Mapping[str, Optimizer]
) -> dict[str, list[tuple[int, ...]]]:
    """Return by optimizer the shapes of its parameters that are not the model's."""
    own = {id(parameter) for parameter in model.parameters()}
    return {
        name: [_shape(p) for p in _held(optimizer) if id(p) not in own]
        for name, optimizer in optimizers.items()
    }


def _left_out_shapes(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> set[tuple[int, ...]]:
    """Return the shapes of the model's trainable parameters that no optimizer holds."""
    held = {id(parameter) for one in optimizers.values() for parameter in _held(one)}
    return {_shape(p) for p in model.parameters() if p.requires_grad and id(p) not in held}


def _held(optimizer: Optimizer) -> Sequence[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _place_among_processes() -> tuple[int, int]:
    """Return rank and number of processes; ``(0, 1)`` without an initialised process group."""
    if dist.is_available() and dist.is_initialized():
        return int(dist.get_rank()), int(dist.get_world_size())
    return 0, 1

"""Which layers of a model behave differently in train and eval mode."""

from __future__ import annotations

from gradguard.evidence import Evidence
from gradguard.facts import ModuleFacts, ModuleReading

RUNNING = ("BatchNorm", "SyncBatchNorm", "LazyBatchNorm", "InstanceNorm")


def is_dropout(one: ModuleFacts) -> bool:
    """Whether it drops values with a probability above 0."""
    return "Dropout" in one.kind and one.settings.get("p", 0.0) > 0


def is_batch_norm(one: ModuleFacts) -> bool:
    """Whether it keeps running statistics of its batches."""
    return one.kind.startswith(RUNNING) and one.settings.get("track_running_stats", 0.0) == 1.0


def layers_with_mode(run: Evidence) -> tuple[ModuleFacts, ...]:
    """Return the layers whose mode matters and that are not frozen.

    A normalisation whose own weights are frozen is kept in eval mode on purpose; so is dropout among
    nothing but frozen weights.
    """
    modules = run.setup.modules if run.setup else ()
    trainable = [name for name, one in run.parameters.items() if one.trainable]
    return tuple(
        one
        for one in modules
        if (is_dropout(one) and _holds(trainable, one.name.rpartition(".")[0]))
        or (is_batch_norm(one) and (not one.settings.get("affine") or _holds(trainable, one.name)))
    )


def modes(run: Evidence) -> dict[str, set[bool]]:
    """Return the modes that every module was read in, by its name."""
    found: dict[str, set[bool]] = {}
    for one in run.of(ModuleReading):
        found.setdefault(one.module, set()).add(one.training)
    return found


def _holds(parameters: list[str], path: str) -> bool:
    return any(not path or name.startswith(f"{path}.") for name in parameters)

"""Builders of what the sensors beside the optimizer's step read, each healthy unless changed."""

from __future__ import annotations

from typing import Any

from gradguard.facts import (
    BatchReading,
    CopyReading,
    GraphNode,
    LoadReading,
    LossReading,
    MetricReading,
    ModuleFacts,
    ModuleReading,
    ProbeReading,
    ReplicaReading,
)
from gradguard.rules._batches import inputs, targets


def module(step: int, name: str = "", kind: str = "Sequential", **changes: Any) -> ModuleReading:
    """Return one module in a training forward: input and output of about 1, with changes."""
    healthy: dict[str, Any] = {
        "input_rms": 1.0,
        "input_max": 3.0,
        "input_nonfinite": 0,
        "input_row_std": 1.0,
        "output_rms": 1.0,
        "output_max": 3.0,
        "output_min": -3.0,
        "output_nonfinite": 0,
        "output_row_std": 0.8,
        "zero_fraction": 0.0,
        "dead_fraction": 0.0,
        "constant_fraction": 0.0,
    }
    return ModuleReading(step=step, module=name, kind=kind, **(healthy | changes))


def batch(step: int, tensor: str = "inputs", **changes: Any) -> BatchReading:
    """Return a batch of 32 rows: 16 normalised features, or labels of 8 classes; with changes."""
    build = targets if tensor.startswith("targets") else inputs
    return build(step, tensor=tensor, **changes)


def layer(name: str, kind: str, *, training: bool = True, **settings: float) -> ModuleFacts:
    """Return one module of the model with these settings."""
    return ModuleFacts(name=name, kind=kind, training=training, settings=settings)


def node(name: str, depth: int, *follows: str, **changes: Any) -> GraphNode:
    """Return one operation in the graph of a loss; ``follows`` are the operations that feed it."""
    return GraphNode(name=name, depth=depth, follows=follows, **changes)


def loss_graph(step: int, *nodes: GraphNode, **changes: Any) -> LossReading:
    """Return the cross entropy of logits of 8 classes for 32 rows, or of these nodes, with changes."""
    healthy: dict[str, Any] = {
        "name": "loss",
        "requires_grad": True,
        "nodes": nodes
        or (
            node("NllLoss", 0, "LogSoftmax", shape=(), reduction=1, ignore_index=-100),
            node("LogSoftmax", 1, "Addmm", shape=(32, 8), dim=1),
            node("Addmm", 2, "AccumulateGrad", "Relu", "T", shape=(32, 8)),
        ),
        "output_shape": (32, 8),
        "linear_layers": 2,
        "nonlinearities": 3,
        "reached": 4,
    }
    return LossReading(step=step, **(healthy | changes))


def copied(step: int, name: str = "averaged", **changes: Any) -> CopyReading:
    """Return a moving average that follows the live weights, with changes."""
    healthy: dict[str, Any] = {
        "role": "averaged",
        "lag": 0.01,
        "live_moved": 0.01 * step,
        "copy_moved": 0.009 * step,
        "changed": True,
        "shared_tensors": 0,
        "matched": 1.0,
        "nonfinite": False,
    }
    return CopyReading(step=step, name=name, **(healthy | changes))


def loaded(step: int = 0, target: str = "model", **changes: Any) -> LoadReading:
    """Return a ``load_state_dict`` that gave every key and changed every value, with changes."""
    healthy: dict[str, Any] = {"expected": 4, "matched": 4, "changed": 1.0}
    return LoadReading(step=step, target=target, **(healthy | changes))


def replica(step: int, rank: int = 0, **changes: Any) -> ReplicaReading:
    """Return one of two replicas: equal weights and gradients, rows of its own, with changes."""
    healthy: dict[str, Any] = {
        "world": 2,
        "parameters": 10.0 + step,
        "gradients": 0.5 + step,
        "rows": tuple(1000.0 * rank + 100.0 * step + i for i in range(8)),
        "local_norm": 0.11 - 0.01 * rank,
        "reduced_norm": 0.1,
    }
    return ReplicaReading(step=step, rank=rank, **(healthy | changes))


def metric(step: int, name: str = "accuracy", value: float = 0.5, **changes: Any) -> MetricReading:
    """Return a number that the user reports on the validation split, with changes."""
    healthy: dict[str, Any] = {"split": "validation"}
    return MetricReading(step=step, name=name, value=value, **(healthy | changes))


def probe(step: int, kind: str, **changes: Any) -> ProbeReading:
    """Return what a probe found; only what is given is known."""
    return ProbeReading(step=step, kind=kind, **changes)

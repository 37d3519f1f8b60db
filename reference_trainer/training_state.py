"""The training state: everything the rest of a run depends on, between two optimizer steps.

A run that is killed and goes on from its last state ends in the same bits as one that was not: the
order of the scenes depends on seed and epoch alone, and everything else that a step reads is here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from reference_trainer.errors import CheckpointError
from reference_trainer.files import load_file, save_file
from reference_trainer.settings import as_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    import gradguard as gg
    from reference_trainer.config import Config
    from reference_trainer.setup import Parts

FORMAT = "reference_trainer.state"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a run has come.

    Attributes:
        epoch: epochs finished.
        windows: windows of the next epoch that are done; each was one attempted optimizer step.
        loss_sum: loss of those windows, summed over their scenes.
        finished: whether training is over: all epochs are, or it was stopped early.
    """

    epoch: int = 0
    windows: int = 0
    loss_sum: float = 0.0
    finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What :func:`capture` reads and :func:`put_back` restores.

    Attributes:
        config: the whole configuration of the run, as nested plain values.
        position: how far the run has come.
        threads: torch's threads; sums come out in other bits under another number.
        weights: state dict of the live model.
        average: of the averaged weights, their count included.
        optimizer: of the optimizer.
        schedule: of the learning rates.
        scaler: of the gradient scaler.
        gate: of the step gate; None without one.
        random: the random state of every process: "cpu" and, on CUDA, "cuda".
    """

    config: Mapping[str, Any]
    position: Position
    threads: int
    weights: Mapping[str, Tensor]
    average: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    scaler: Mapping[str, Any]
    gate: Mapping[str, Any] | None
    random: list[dict[str, Tensor]]


def capture(
    parts: Parts, gate: gg.StepGate | None, config: Config, position: Position
) -> TrainingState:
    """Read the state of a run between two steps; its tensors are the live ones, not copies.

    Must be called by all processes of the run. Sync: waits for the device.
    """
    return TrainingState(
        config=as_mapping(config),
        position=position,
        threads=torch.get_num_threads(),
        weights=parts.model.state_dict(),
        average=parts.averaged.state_dict(),
        optimizer=parts.optimizer.state_dict(),
        schedule=parts.schedule.state_dict(),
        scaler=parts.scaler.state_dict(),
        gate=None if gate is None else gate.state_dict(),
        random=_random_states(parts),
    )


def put_back(state: TrainingState, parts: Parts, gate: gg.StepGate | None) -> None:
    """Bring freshly assembled parts, the gate and the random generators to ``state``.

    Raises:
        CheckpointError: the state is of another network or of another number of processes.
    """
    if len(state.random) != parts.processes.count:
        raise CheckpointError(
            f"the training state is of a run of {len(state.random)} processes, this one has "
            f"{parts.processes.count}; resume it with as many, torchrun --nproc-per-node "
            f"{len(state.random)}, or its weights would not come out the same"
        )
    try:
        parts.model.load_state_dict(dict(state.weights))
        parts.averaged.load_state_dict(state.average)
        parts.optimizer.load_state_dict(dict(state.optimizer))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the training state is of another network: {reason}") from error
    parts.schedule.load_state_dict(dict(state.schedule))
    parts.scaler.load_state_dict(dict(state.scaler))
    if gate is not None and state.gate is not None:
        gate.load_state_dict(state.gate)
    own = state.random[parts.processes.rank]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"])


def save_state(path: Path, state: TrainingState) -> None:
    """Write a state so that ``path`` holds either the old one or the whole new one.

    Memory: 262 MB on the disk, and once more in memory while it is written.

    Raises:
        CheckpointError: the file could not be written; a previous one is left as it was.
    """
    content = {field.name: getattr(state, field.name) for field in fields(state)}
    head = {"format": FORMAT, "schema": SCHEMA_VERSION}
    plain = {"position": asdict(state.position), "weights": dict(state.weights)}
    save_file(path, head | content | plain, kind="training state")


def load_state(path: Path) -> TrainingState:
    """Read a state; its tensors are on the CPU.

    Raises:
        CheckpointError: there is no such file, or it is torn, foreign or of another version.
    """
    content = load_file(
        path,
        kind="training state",
        file_format=FORMAT,
        schema=SCHEMA_VERSION,
        names=[field.name for field in fields(TrainingState)],
    )
    return TrainingState(**(content | {"position": Position(**content["position"])}))


def _random_states(parts: Parts) -> list[dict[str, Tensor]]:
    """The random states of all processes, in the order of their ranks."""
    own = {"cpu": torch.get_rng_state()}
    if parts.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state()
    collected = {name: parts.processes.collect(value) for name, value in own.items()}
    ranks = range(parts.processes.count)
    return [{name: values[rank] for name, values in collected.items()} for rank in ranks]

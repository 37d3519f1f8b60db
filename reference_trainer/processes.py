"""The processes of one run: which scenes are whose, and what they tell each other.

``torchrun`` starts them and names them in the environment. Without it there is one, and nothing here
does anything.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all those of the run; the methods but :meth:`share` must be called by all.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def share(self, index: Tensor) -> tuple[Tensor, int]:
        """Return this process's part [m] of a batch [n], and the scenes it stands for.

        Gradients are averaged over processes, so a part of m scenes of ``count`` parts stands for
        m * count scenes, and the parts together for count * n. Where there are fewer scenes than
        processes, some take part with a scene that stands for none.
        """
        if self.count == 1:
            return index, len(index)
        part = index.tensor_split(self.count)[self.rank]
        return (part, len(part) * self.count) if len(part) else (index[:1], 0)

    def replicate(self, model: nn.Module, *, some_unused: bool) -> nn.Module:
        """Return what a training step calls: ``model``, its gradients averaged over processes.

        Args:
            model: the same on all processes.
            some_unused: whether the loss does not reach every parameter.
        """
        if self.count == 1:
            return model
        return DistributedDataParallel(
            model, broadcast_buffers=False, find_unused_parameters=some_unused
        )

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of ``value`` over processes, the same bits on each."""
        if self.count == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.count

    def collect(self, value: Tensor) -> list[Tensor]:
        """Return the ``value`` of every process, on the CPU; they have one shape and dtype."""
        if self.count == 1:
            return [value.cpu()]
        here = value.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        found = [torch.empty_like(here) for _ in range(self.count)]
        dist.all_gather(found, here)
        return [one.cpu() for one in found]

    def agree(self, value: T) -> T:
        """Return what the first process passed."""
        if self.count == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said)
        return said[0]


ALONE = Processes()
"""A run of one process."""


def keeping_gradients(network: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Hold the exchange of gradients back in all micro-batches of a window but the last."""
    if last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    held_back: AbstractContextManager[None] = network.no_sync()
    return held_back


@contextmanager
def joined_processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started until the block ends; :data:`ALONE` without it.

    Args:
        device: where the run computes; on CUDA each process takes the device of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank=dist.get_rank(), count=dist.get_world_size())
    finally:
        dist.destroy_process_group()

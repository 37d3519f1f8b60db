"""Faults of data-parallel replicas: two real processes over gloo, judged together."""

from __future__ import annotations

import atexit
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import gradguard as gg
from gradguard.replica_logs import together
from gradguard.runlog import RunLog
from tests.faults.cases import fault, healthy, network, regression

RANKS, STEPS = 2, 6


@cache
def workers() -> ProcessPoolExecutor:
    """Return two processes that were forked from one that has imported torch and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gradguard", "tests.faults.distributed"])
    pool = ProcessPoolExecutor(RANKS, mp_context=context)
    atexit.register(pool.shutdown)
    return pool


def replicas(kind: str, broken: bool) -> RunLog:
    """Train on two ranks and return the log of the first one, which knows what the other holds."""
    seed = torch.initial_seed()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meet'}"
        running = [
            workers().submit(rank_log, kind, broken, rank, seed, meeting) for rank in range(RANKS)
        ]
        logs = [one.result(timeout=60) for one in running]
    return together([RunLog.from_jsonl(text) for text in logs])[0]


def rank_log(kind: str, broken: bool, rank: int, seed: int, meeting: str) -> str:
    """Train one rank and return its log as JSON Lines."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    try:
        return train(kind, broken, rank, seed).to_jsonl()
    finally:
        dist.destroy_process_group()


def train(kind: str, broken: bool, rank: int, seed: int) -> RunLog:
    """Train on this rank's rows; ``kind`` says what is done wrong when ``broken``."""
    torch.manual_seed(seed + (rank if broken and kind == "init" else 0))
    model = nn.Sequential(nn.BatchNorm1d(8), network()) if kind == "buffers" else network()
    by_hand = kind in ("init", "reduction") or (broken and kind == "buffers")
    module: nn.Module = model if by_hand else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    torch.manual_seed(seed if broken and kind == "data" else seed + 17 * rank)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(STEPS):
            loss = functional.mse_loss(module(x + 3 * rank * (kind == "buffers")), y)
            guard.observe(loss=loss)
            loss.backward()
            if by_hand:
                reduce_gradients(model, mean=not (broken and kind == "reduction"))
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


def reduce_gradients(model: nn.Module, *, mean: bool) -> None:
    """Add the gradients of all ranks up, and divide them by their number."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            if mean:
                parameter.grad /= RANKS


@fault("distributed", "GG1301")
def each_rank_draws_its_own_weights(broken: bool) -> RunLog:
    """A hand-written data-parallel loop seeds every rank differently before the model is made."""
    return replicas("init", broken)


@fault("distributed", "GG1302")
def running_statistics_stay_local(broken: bool) -> RunLog:
    """A hand-written reduction leaves buffers alone, and every rank sees other data."""
    return replicas("buffers", broken)


@fault("distributed", "GG1303")
def gradients_are_summed_over_ranks(broken: bool) -> RunLog:
    """Gradients are added up over ranks and never divided."""
    return replicas("reduction", broken)


@fault("distributed", "GG1304")
def every_rank_reads_the_same_rows(broken: bool) -> RunLog:
    """The loader has no distributed sampler."""
    return replicas("data", broken)


@healthy
def replicas_of_a_batchnorm_model() -> RunLog:
    """Two ranks with different data and broadcast buffers."""
    return replicas("buffers", False)

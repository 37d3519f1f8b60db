"""Gates of several processes reach one verdict, whatever a single rank sees."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from gradguard.gate import StepGate
from gradguard.policies import AnySignal, Finite, LossSpike, NormSpike

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

RANKS = 2
# (gradient of rank 0, of rank 1, loss of rank 0, of rank 1, verdict on both); None: no gradient.
# The first ones are the warm-up of the estimates.
SCENES = [
    (1.0, 1.0, 1.0, 1.0, None),
    (1.0, 1.1, 1.0, 1.1, None),
    (1.0, 1.0, 1.2, 1.0, None),
    (1.0, math.nan, 1.0, 1.0, "Finite"),
    (math.inf, 1.0, 1.0, 1.0, "Finite"),
    (0.0, 1.0, 1.0, 1.0, None),
    (0.0, 0.0, 1.0, 1.0, "AnySignal"),
    (None, 1.0, 1.0, 1.0, None),
    (None, math.nan, 1.0, 1.0, "Finite"),
    (None, None, 1.0, 1.0, None),
    (1.0, 90.0, 1.0, 1.0, "NormSpike"),
    (1.0, 1.0, 1.0, 90.0, "LossSpike"),
    (1.0, 1.0, math.nan, 1.0, "LossSpike"),
    (1.0, 1.0, 1.0, -math.inf, "LossSpike"),
    (1.0, 1e25, 1.0, 1.0, "NormSpike"),  # the norm overflows; the device takes it for Inf
    (1.0, 1.0, 1.0, 1.0, None),
]


def replicated(rank, fused):
    """Step through the scenes on one rank; return the policies that vetoed and the estimates."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    weight.grad = torch.ones(2)
    optimizer.step()
    policies = (Finite(), AnySignal(), NormSpike(warmup=3), LossSpike(warmup=3))
    gate = StepGate(optimizer, policies, max_consecutive=99)
    for scene in SCENES:
        gradient = scene[rank]
        weight.grad = None if gradient is None else torch.full((2,), gradient)
        gate.observe(loss=scene[2 + rank])
        optimizer.step()
    gate.flush()
    return [d.policy for d in gate.decisions], [repr(s.tolist()) for s in gate._states]


def sharded(rank, fused):
    """Train an FSDP model with NaN in the last rank's shard only; return verdicts and motion."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    dist.fsdp.fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    gate = StepGate(optimizer)
    moved = []
    for index in range(4):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        if index in (0, 2) and rank == RANKS - 1:
            model.weight.grad.to_local()[-1] = math.nan
        before = model.weight.to_local().detach().clone()
        optimizer.step()
        moved.append(bool((model.weight.to_local() != before).all()))
    gate.flush()
    return [d.policy for d in gate.decisions], moved


def worker(rank, folder):
    """Run everything on one rank and write what came out."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    results = [run(rank, fused) for run in (replicated, sharded) for fused in (False, True)]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every rank wrote: replicated and sharded, unfused and fused."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(worker, (folder,), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("back_end", [0, 1], ids=["hide", "device"])
def test_ranks_agree_whoever_sees_the_trouble(results, back_end):
    """A bad gradient or loss on one rank vetoes on both; signal on one rank is signal; one memory."""
    expected = [scene[4] for scene in SCENES]
    if back_end == 1:
        expected[14] = "Finite"
    assert [rank[back_end][0] for rank in results] == [expected] * RANKS
    assert results[0][back_end][1] == results[1][back_end][1]


@pytest.mark.parametrize("back_end", [2, 3], ids=["hide", "device"])
def test_shards_are_judged_together(results, back_end):
    """NaN in one rank's shard stops the step on all ranks; a clean step moves all shards."""
    for rank in results:
        assert rank[back_end] == [["Finite", None, "Finite", None], [False, True, False, True]]

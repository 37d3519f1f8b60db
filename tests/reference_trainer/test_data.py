"""The two sets of a run and the order of their batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.config import ScenesConfig
from reference_trainer.data import batches, draw_data, require_disjoint, windows
from reference_trainer.errors import DataError
from reference_trainer.physics import ScenePhysics
from reference_trainer.scenes import draw_scenes

SIZES = {"count": st.integers(1, 60), "batch_scenes": st.integers(1, 70)}


@given(**SIZES, seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_holds_every_scene_once(
    count: int, batch_scenes: int, seed: int, epoch: int
) -> None:
    """Every scene is in exactly one batch; only the last batch may be short."""
    drawn = list(batches(count, batch_scenes=batch_scenes, seed=seed, epoch=epoch))
    assert sorted(torch.cat(drawn).tolist()) == list(range(count))
    assert all(len(batch) == batch_scenes for batch in drawn[:-1])


def test_the_order_is_that_of_the_epoch_alone() -> None:
    """The same epoch has the same order whatever came before; another epoch has another one."""

    def order(epoch: int) -> list[int]:
        return torch.cat(list(batches(50, batch_scenes=7, seed=3, epoch=epoch))).tolist()

    first = order(5)
    torch.rand(10)
    assert order(5) == first
    assert order(6) != first


@given(st.integers(0, 30), st.integers(1, 8))
def test_windows_lose_no_batch(count: int, accumulation: int) -> None:
    """Windows hold all batches in order, each of full length but the last."""
    drawn = [torch.tensor([number]) for number in range(count)]
    grouped = list(windows(drawn, accumulation))
    assert [batch for window in grouped for batch in window] == drawn
    assert all(len(window) == accumulation for window in grouped[:-1])
    assert all(grouped)


def test_the_sets_share_no_scene() -> None:
    """Memorised and held-out scenes of one seed are drawn from streams of their own."""
    config = ScenesConfig(train=12, validation=9)
    data = draw_data(config, device=torch.device("cpu"))
    require_disjoint(data.memorised.scenes, data.held_out.scenes)
    assert (len(data.memorised), len(data.held_out)) == (12, 9)


def test_a_shared_scene_is_refused() -> None:
    """One training scene among the held-out ones stops the run before it starts."""
    scenes = draw_scenes(ScenePhysics(), seed=0, split="train", indices=range(6))
    with pytest.raises(DataError, match="1 of the 2 held-out scenes are training scenes"):
        require_disjoint(scenes.select(slice(0, 5)), scenes.select(slice(4, 6)))

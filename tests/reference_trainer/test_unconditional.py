"""The unconditional likelihood against dense covariances, and what it is worth for i.i.d. symbols."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference_trainer.descent import ANGLE_MARGIN_RAD
from reference_trainer.geometry import steering_vectors
from reference_trainer.likelihood import LikelihoodFit
from reference_trainer.localisation.most_likely import most_likely_from
from reference_trainer.matching import source_errors
from reference_trainer.metrics import summarise
from reference_trainer.physics import ScenePhysics
from reference_trainer.positions import Positions, true_positions
from reference_trainer.refinement import refine
from reference_trainer.scenes import Scenes, draw_scenes
from reference_trainer.sensing import SensingBlocks, sensing_blocks
from reference_trainer.unconditional import marginal_at, refine_unconditional

PHYSICS = ScenePhysics(symbols="iid")


def drawn(count: int = 24) -> Scenes:
    """Some scenes with a new symbol each snapshot."""
    return draw_scenes(PHYSICS, seed=8, split="test", indices=range(count), estimate=False)


def alike(scenes: Scenes, count: int) -> tuple[SensingBlocks, Tensor]:
    """The equations of the scenes of ``count`` sources, and their true parameters [B, count, 3]."""
    chosen = scenes.select((scenes.num_sources == count).nonzero().squeeze(-1))
    truth = (chosen.azimuth_rad, chosen.elevation_rad, 1 / chosen.range_m)
    blocks = sensing_blocks(PHYSICS, chosen, double=True)
    return blocks, torch.stack(truth, dim=-1)[:, :count].double()


def dense_cost(blocks: SensingBlocks, parameters: Tensor, power: Tensor) -> float:
    """The negative log likelihood of one scene, from the covariance of its snapshots, written out."""
    vectors = steering_vectors(PHYSICS, parameters[:, 0], parameters[:, 1], 1 / parameters[:, 2])
    total, noise = 0.0, float(blocks.noise_power[0])
    for matrix, target in zip(blocks.matrix[0], blocks.target[0], strict=True):
        columns = matrix @ vectors.mT.to(matrix.dtype)
        whole = columns @ torch.diag(power.to(matrix.dtype)) @ columns.mH / noise
        covariance = torch.eye(len(target), dtype=matrix.dtype) + whole
        whitened = torch.linalg.solve(covariance, target) / noise
        total += float((target.conj() @ whitened).real + torch.linalg.slogdet(covariance).logabsdet)
    return total


@pytest.mark.parametrize("count", [1, 3])
def test_the_cost_is_that_of_the_covariance_written_out(count: int) -> None:
    """Determinant and quadratic form by K numbers equal those of the full covariances."""
    blocks, truth = alike(drawn(), count)
    power = torch.linspace(0.3, 40.0, count, dtype=torch.float64).expand(len(blocks), -1)
    found = marginal_at(PHYSICS, blocks, truth, power=power, rounds=0).cost
    for scene in range(len(blocks)):
        one = blocks.select(slice(scene, scene + 1))
        expected = dense_cost(one, truth[scene], power[scene])
        assert float(found[scene]) == pytest.approx(expected, rel=1e-6)


def test_the_slope_is_that_of_the_cost() -> None:
    """The slope is minus half the derivative of the cost, in units of the noise, by differences."""
    blocks, truth = alike(drawn(), 2)
    power = torch.tensor([3.0, 20.0], dtype=torch.float64).expand(len(blocks), -1)

    def cost(parameters: Tensor) -> Tensor:
        return marginal_at(PHYSICS, blocks, parameters, power=power, rounds=0).cost

    slope = marginal_at(PHYSICS, blocks, truth, power=power, rounds=0).slope.reshape(-1, 3, 2).mT
    step = 1e-5
    for source in range(2):
        for coordinate in range(3):
            move = torch.zeros_like(truth)
            move[:, source, coordinate] = step
            difference = (cost(truth + move) - cost(truth - move)) / (2 * step)
            expected = -0.5 * difference * blocks.noise_power
            torch.testing.assert_close(slope[:, source, coordinate], expected, rtol=1e-4, atol=1e-4)


def test_rounds_for_the_powers_never_raise_the_cost() -> None:
    """Each round of expectation maximisation lowers the cost or leaves it, from any powers."""
    blocks, truth = alike(drawn(), 3)
    before = marginal_at(PHYSICS, blocks, truth, power=None, rounds=0)
    for _ in range(6):
        after = marginal_at(PHYSICS, blocks, truth, power=before.power, rounds=1)
        assert bool((after.cost <= before.cost + 1e-9 * before.cost.abs()).all())
        before = after


def test_the_end_is_more_likely_than_the_start() -> None:
    """The descent lowers the cost of the truth by about half a unit for each coordinate or more."""
    scenes = drawn(60)
    none = refine_unconditional(PHYSICS, scenes, true_positions(scenes), iterations=1).misfit
    found = refine_unconditional(PHYSICS, scenes, true_positions(scenes), iterations=12).misfit
    assert bool((found <= none + 1e-9).all())
    assert float((none - found).mean()) > 0.2


def test_it_is_nearer_the_sources_than_the_conditional_likelihood() -> None:
    """Of many scenes at middling noise, more sources are found and their median error is smaller."""
    scenes = draw_scenes(PHYSICS, seed=9, split="test", indices=range(120), estimate=False)
    conditional = refine(PHYSICS, scenes, true_positions(scenes), replacements=0).positions
    settled = refine_unconditional(PHYSICS, scenes, conditional).positions
    truth = true_positions(scenes)
    before, after = (summarise(source_errors(one, truth)) for one in (conditional, settled))
    assert after.azimuth_deg.median < before.azimuth_deg.median
    assert after.elevation_deg.median < before.elevation_deg.median
    assert after.within_2_deg >= before.within_2_deg


def test_between_two_starts_this_likelihood_decides() -> None:
    """With each start right in every other scene, the end is as likely as the better one's."""
    scenes = drawn(24)
    truth = true_positions(scenes)
    elsewhere = {"azimuth_rad": truth.azimuth_rad / 2, "elevation_rad": -truth.elevation_rad}
    astray = replace(truth, **elsewhere)
    even = torch.arange(0, 24, 2)
    one = astray.replaced(even, truth.select(even))
    two = truth.replaced(even, astray.select(even))

    def cost(*starts: Positions) -> Tensor:
        found = most_likely_from(PHYSICS, scenes, *starts)
        return refine_unconditional(PHYSICS, scenes, found, iterations=1).misfit

    alone = cost(one), cost(two)
    together = cost(one, two)
    assert all(float((single - together).max()) > 1.0 for single in alone)
    assert float((together - torch.minimum(*alone)).max()) < 0.01


def test_the_better_of_two_fits_is_chosen_scene_by_scene() -> None:
    """Positions and misfit come from the fit with the smaller misfit, and of equals from the first."""
    scenes = drawn(3)
    here = true_positions(scenes)
    there = replace(here, azimuth_rad=here.azimuth_rad + 1.0)
    one = LikelihoodFit(positions=here, misfit=torch.tensor([1.0, 2.0, 3.0]))
    other = LikelihoodFit(positions=there, misfit=torch.tensor([2.0, 1.0, 3.0]))
    better = one.better_of(other)
    assert better.misfit.tolist() == [1.0, 1.0, 3.0]
    expected = torch.stack([here.azimuth_rad[0], there.azimuth_rad[1], here.azimuth_rad[2]])
    assert torch.equal(better.positions.azimuth_rad, expected)


def test_fits_do_not_depend_on_chunks_and_stay_in_the_region() -> None:
    """One by one and together scenes end alike; from an absurd start angles stay in the field of view."""
    scenes = drawn(8)
    start = true_positions(scenes)
    alone = refine_unconditional(PHYSICS, scenes, start, chunk=1)
    together = refine_unconditional(PHYSICS, scenes, start, chunk=8)
    torch.testing.assert_close(alone.misfit, together.misfit, rtol=1e-6, atol=1e-6)
    far = Positions(
        azimuth_rad=torch.full_like(start.azimuth_rad, 3.0),
        elevation_rad=start.elevation_rad,
        range_m=start.range_m.clamp_min(1.0),
        active=start.active,
    )
    azimuth_rad = refine_unconditional(PHYSICS, scenes, far).positions.azimuth_rad[start.active]
    assert bool((azimuth_rad.abs() <= math.radians(60) + ANGLE_MARGIN_RAD + 1e-6).all())


def test_a_scene_without_sources_keeps_none() -> None:
    """A start that says "no source" is a fit of nothing: all energy is left."""
    scenes = drawn(4)
    truth = true_positions(scenes)
    nobody = Positions(
        azimuth_rad=truth.azimuth_rad,
        elevation_rad=truth.elevation_rad,
        range_m=truth.range_m,
        active=torch.zeros_like(truth.active),
    )
    fit = refine_unconditional(PHYSICS, scenes, nobody)
    energy = scenes.snapshots.abs().square().sum(dim=(1, 2)) * 10 ** (scenes.snr_db / 10)
    torch.testing.assert_close(fit.misfit.float(), energy, rtol=1e-4, atol=0)
    assert not bool(fit.positions.active.any())


def test_one_symbol_a_scene_is_refused() -> None:
    """A power cannot be told from one sample; the message says what to use instead."""
    physics = ScenePhysics(symbols="constant")
    scenes = draw_scenes(physics, seed=8, split="test", indices=range(2), estimate=False)
    with pytest.raises(ValueError, match="expected 'iid', or use refine alone"):
        refine_unconditional(physics, scenes, true_positions(scenes))


@pytest.mark.parametrize("option", ["iterations", "chunk"])
def test_options_below_one_are_refused(option: str) -> None:
    """The message names the option and the value."""
    scenes = drawn(2)
    with pytest.raises(ValueError, match=f"{option} is 0"):
        refine_unconditional(PHYSICS, scenes, true_positions(scenes), **{option: 0})

"""The fits against plain least squares, and what they promise about the sources."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from reference_trainer.descent import ANGLE_MARGIN_RAD, RANGE_MARGIN, descend, projection_at
from reference_trainer.geometry import steering_vectors
from reference_trainer.likelihood import (
    LikelihoodFit,
    fits_of_every_number,
    maximum_likelihood,
    number_by_bic,
)
from reference_trainer.physics import ScenePhysics, SymbolModel
from reference_trainer.positions import Positions, true_positions
from reference_trainer.pursuit import explained_alone
from reference_trainer.refinement import refine, refine_each
from reference_trainer.residual_search import GridShape, gains, grid_response, make_grid
from reference_trainer.scenes import Scenes, draw_scenes
from reference_trainer.sensing import SensingBlocks, sensed, sensing_blocks

MODELS: tuple[SymbolModel, ...] = ("constant", "iid")
SMALL_GRID = GridShape(azimuths=5, elevations=3, ranges=2)


def drawn(
    symbols: SymbolModel, count: int = 24, *, snr_db: float | None = None, most: int = 5
) -> tuple[ScenePhysics, Scenes]:
    """Some scenes of up to ``most`` sources, all at one signal-to-noise ratio if it is given."""
    physics = ScenePhysics(symbols=symbols, max_sources=most)
    if snr_db is not None:
        physics = replace(physics, min_snr_db=snr_db, max_snr_db=snr_db)
    return physics, draw_scenes(physics, seed=6, split="test", indices=range(count), estimate=False)


def alike(scenes: Scenes, count: int) -> tuple[Scenes, Tensor]:
    """The scenes of ``count`` sources, and their true parameters [B, count, 3]."""
    chosen = scenes.select((scenes.num_sources == count).nonzero().squeeze(-1))
    truth = (chosen.azimuth_rad, chosen.elevation_rad, 1 / chosen.range_m)
    return chosen, torch.stack(truth, dim=-1)[:, :count].double()


def shifted(positions: Positions, *, angle_rad: float, range_m: float = 0.0) -> Positions:
    """The positions with every source moved, each by the same amount but with a sign of its own."""
    generator = torch.Generator().manual_seed(3)

    def signs() -> Tensor:
        return 2.0 * torch.randint(0, 2, positions.active.shape, generator=generator) - 1

    return replace(
        positions,
        azimuth_rad=positions.azimuth_rad + angle_rad * signs(),
        elevation_rad=positions.elevation_rad + angle_rad * signs(),
        range_m=(positions.range_m + range_m * signs()).clamp_min(1.0),
    )


def least_squares_residual(physics: ScenePhysics, blocks: SensingBlocks, point: Tensor) -> float:
    """What is left of one scene's snapshots, by the QR-based solver, block by block."""
    vectors = steering_vectors(physics, point[:, 0], point[:, 1], 1 / point[:, 2]).numpy()
    total = float(blocks.energy[0] - blocks.target[0].abs().square().sum())
    for matrix, target in zip(blocks.matrix[0].numpy(), blocks.target[0].numpy(), strict=True):
        columns = matrix @ vectors.T
        solution = np.linalg.lstsq(columns, target, rcond=None)[0]
        total += float(np.sum(np.abs(target - columns @ solution) ** 2))
    return total


def worst_angle_rad(fit: Positions, scenes: Scenes) -> Tensor:
    """The largest angle between a true source and the estimate nearest to it, [B]."""

    def directions(positions: Positions) -> Tensor:
        azimuth, elevation = positions.azimuth_rad, positions.elevation_rad
        parts = (azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos())
        return torch.stack(parts, dim=-1).double()

    cosines = directions(true_positions(scenes)) @ directions(fit).mT
    angles = cosines.clamp(-1, 1).acos().masked_fill(~fit.active.unsqueeze(1), math.inf)
    return angles.amin(-1).masked_fill(~scenes.active, 0.0).amax(-1)


@pytest.mark.parametrize("symbols", MODELS)
def test_the_residual_is_that_of_least_squares(symbols: SymbolModel) -> None:
    """Solving for the symbols by inner products leaves what a QR-based solver leaves."""
    physics, scenes = drawn(symbols)
    chosen, truth = alike(scenes, 3)
    blocks = sensing_blocks(physics, chosen, double=True)
    found = projection_at(physics, blocks, truth).residual
    for scene in range(len(chosen)):
        one = blocks.select(slice(scene, scene + 1))
        expected = least_squares_residual(physics, one, truth[scene])
        assert float(found[scene]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("symbols", MODELS)
def test_the_slope_is_that_of_the_residual(symbols: SymbolModel) -> None:
    """The slope is minus half the derivative of the residual, by finite differences."""
    physics, scenes = drawn(symbols)
    chosen, truth = alike(scenes, 2)
    blocks = sensing_blocks(physics, chosen, double=True)
    slope = projection_at(physics, blocks, truth).slope.reshape(-1, 3, 2).mT
    step = 1e-5
    for source in range(2):
        for coordinate in range(3):
            move = torch.zeros_like(truth)
            move[:, source, coordinate] = step
            ahead, behind = (
                projection_at(physics, blocks, truth + sign * move).residual for sign in (1, -1)
            )
            expected = -(ahead - behind) / (4 * step)
            torch.testing.assert_close(slope[:, source, coordinate], expected, rtol=1e-4, atol=1e-3)


def test_the_curvature_is_that_of_the_residual_without_noise() -> None:
    """Where nothing is left unexplained, Gauss-Newton is the Hessian: the slope's own slope."""
    physics, scenes = drawn("iid", snr_db=90.0)
    chosen, truth = alike(scenes, 2)
    blocks = sensing_blocks(physics, chosen, double=True)
    curvature = projection_at(physics, blocks, truth).curvature
    step = 1e-5
    for index in range(6):
        move = torch.zeros_like(truth)
        move[:, index % 2, index // 2] = step
        ahead, behind = (projection_at(physics, blocks, truth + s * move).slope for s in (1, -1))
        scale = curvature.abs().amax(dim=(1, 2)).unsqueeze(-1)
        difference = (behind - ahead) / (2 * step) / scale
        torch.testing.assert_close(difference, curvature[:, index] / scale, rtol=0, atol=2e-3)


@pytest.mark.parametrize("symbols", MODELS)
def test_gains_are_drops_of_the_residual(symbols: SymbolModel) -> None:
    """The gain of a grid point is how far the residual falls when a source is added there."""
    physics, scenes = drawn(symbols)
    chosen, truth = alike(scenes, 2)
    blocks = sensing_blocks(physics, chosen, double=True)
    grid = make_grid(physics, SMALL_GRID, device=torch.device("cpu"))
    assert grid.points.shape == (30, 3)
    vectors = steering_vectors(physics, truth[..., 0], truth[..., 1], 1 / truth[..., 2])
    found = gains(grid_response(blocks, grid), blocks.target, sensed(blocks, vectors))
    before = projection_at(physics, blocks, truth).residual
    for index, point in enumerate(grid.points):
        added = torch.cat((truth, point.expand(len(chosen), 1, 3)), dim=1)
        drop = before - projection_at(physics, blocks, added).residual
        torch.testing.assert_close(found[:, index].double(), drop, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("symbols", MODELS)
def test_what_a_source_explains_alone_is_missing_without_it(symbols: SymbolModel) -> None:
    """Taking a source out raises the residual by what it explained alone."""
    physics, scenes = drawn(symbols)
    chosen, truth = alike(scenes, 3)
    blocks = sensing_blocks(physics, chosen, double=True)
    vectors = steering_vectors(physics, truth[..., 0], truth[..., 1], 1 / truth[..., 2])
    shares = explained_alone(sensed(blocks, vectors), blocks.target)
    whole = projection_at(physics, blocks, truth).residual
    for source in range(3):
        rest = truth[:, [other for other in range(3) if other != source]]
        rise = projection_at(physics, blocks, rest).residual - whole
        torch.testing.assert_close(shares[:, source], rise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symbols", MODELS)
def test_a_descent_never_climbs_and_ends_level(symbols: SymbolModel) -> None:
    """The fit is at least as likely as the truth, by about half a unit for each coordinate."""
    physics, scenes = drawn(symbols, 60, snr_db=10.0, most=3)
    chosen, truth = alike(scenes, 1)
    blocks = sensing_blocks(physics, chosen)
    fit = descend(physics, blocks, truth, iterations=20)
    before = projection_at(physics, blocks, truth).residual
    gain = (before - fit.residual) / blocks.noise_power
    assert bool((gain >= 0).all())
    assert 0.5 < float(gain.mean()) < 3.0
    again = descend(physics, blocks, fit.parameters, iterations=20)
    torch.testing.assert_close(again.residual, fit.residual, rtol=1e-4, atol=0)


@pytest.mark.parametrize("symbols", MODELS)
def test_maximum_likelihood_finds_every_source_where_noise_is_low(symbols: SymbolModel) -> None:
    """At 30 dB nearly every scene has an estimate within half a degree of every source."""
    physics, scenes = drawn(symbols, 15, snr_db=30.0)
    fit = maximum_likelihood(physics, scenes, scenes.num_sources)
    assert torch.equal(fit.positions.num_sources, scenes.num_sources)
    found = worst_angle_rad(fit.positions, scenes) < math.radians(0.5)
    assert float(found.double().mean()) >= 0.9


@pytest.mark.parametrize("symbols", MODELS)
def test_from_scratch_is_rarely_less_likely_than_from_the_truth(symbols: SymbolModel) -> None:
    """Who knew the truth would hardly ever find a better fit: misses are the data's, not the search's."""
    physics, scenes = drawn(symbols, 20, most=3)
    scratch = maximum_likelihood(physics, scenes, scenes.num_sources).misfit
    told = refine(physics, scenes, true_positions(scenes), replacements=0, iterations=20).misfit
    assert float((scratch < told + 1).double().mean()) >= 0.85


@pytest.mark.parametrize("symbols", MODELS)
def test_a_start_near_the_sources_is_enough(symbols: SymbolModel) -> None:
    """From 2 degrees and 0.3 m off, at 15 dB, the fit is where it is from the truth, nine times in ten."""
    physics, scenes = drawn(symbols, 24, snr_db=15.0)
    truth = true_positions(scenes)
    start = shifted(truth, angle_rad=math.radians(2), range_m=0.3)
    near = refine(physics, scenes, start)
    told = refine(physics, scenes, truth)
    assert float(((near.misfit - told.misfit) < 1).double().mean()) >= 0.85
    assert torch.equal(near.positions.active, scenes.active)


def test_a_wrong_source_is_replaced() -> None:
    """With one source of each scene put elsewhere, replacements restore the fit; without, nothing does."""
    physics, scenes = drawn("constant", 24, snr_db=15.0)
    truth = true_positions(scenes)
    moved = torch.where(truth.azimuth_rad[:, :1] > 0, -0.9, 0.9)
    azimuth = torch.cat((moved, truth.azimuth_rad[:, 1:]), dim=1)
    start = replace(truth, azimuth_rad=azimuth)
    told = refine(physics, scenes, truth).misfit
    stuck = refine(physics, scenes, start, replacements=0).misfit
    mended = refine(physics, scenes, start).misfit
    assert float(((stuck - told) < 5).double().mean()) < 0.5
    assert float(((mended - told) < 5).double().mean()) >= 0.85


@pytest.mark.parametrize("symbols", MODELS)
def test_of_several_starts_the_better_counts(symbols: SymbolModel) -> None:
    """Scene by scene the fit is that of the start that ends in the more likely place, in any order."""
    physics, scenes = drawn(symbols, 24, snr_db=15.0)
    truth = true_positions(scenes)
    far = shifted(truth, angle_rad=math.radians(15))
    starts = [
        Positions(
            **{
                name: torch.where(even[:, None], getattr(truth, name), getattr(far, name))
                for name in truth.__slots__
            }
        )
        for even in (torch.arange(24) % 2 == 0, torch.arange(24) % 2 == 1)
    ]
    alone = [refine(physics, scenes, one, replacements=0, iterations=20).misfit for one in starts]
    both = refine(physics, scenes, *starts, replacements=0, iterations=20)
    swapped = refine(physics, scenes, *reversed(starts), replacements=0, iterations=20)
    torch.testing.assert_close(both.misfit, torch.minimum(*alone), rtol=1e-3, atol=0)
    torch.testing.assert_close(both.misfit, swapped.misfit, rtol=1e-3, atol=0)
    assert bool((alone[0] > both.misfit + 1).any())
    assert bool((alone[1] > both.misfit + 1).any())


@pytest.mark.parametrize("symbols", MODELS)
def test_each_start_is_refined_as_if_it_were_alone(symbols: SymbolModel) -> None:
    """All at once or one by one: the same ends to the bit, in the slots of each."""
    physics, scenes = drawn(symbols, 6)
    truth = true_positions(scenes)
    turned = replace(truth, **{name: getattr(truth, name).flip(1) for name in truth.__slots__})
    astray = replace(turned, elevation_rad=-turned.elevation_rad)
    for start, fit in zip(
        (truth, astray), refine_each(physics, scenes, truth, astray), strict=True
    ):
        alone = refine(physics, scenes, start)
        assert torch.equal(fit.misfit, alone.misfit)
        assert torch.equal(fit.positions.active, start.active)
        assert torch.equal(
            fit.positions.range_m[start.active], alone.positions.range_m[start.active]
        )


def test_starts_must_agree_on_the_number_of_sources() -> None:
    """Fits of different numbers cannot be compared; the message names the first such scene."""
    physics, scenes = drawn("constant", 4)
    truth = true_positions(scenes)
    active = truth.active.clone()
    active[2] = False
    with pytest.raises(ValueError, match="in scene 2"):
        refine(physics, scenes, truth, replace(truth, active=active))
    with pytest.raises(ValueError, match="no start was given"):
        refine(physics, scenes)


def test_estimates_stay_where_sources_can_be() -> None:
    """From any start, however absurd, angles and ranges stay in the field of view and its margin."""
    physics, scenes = drawn("constant")
    shape = scenes.active.shape
    start = Positions(
        azimuth_rad=torch.full(shape, 3.0),
        elevation_rad=torch.full(shape, -2.0),
        range_m=torch.zeros(shape),
        active=torch.ones(shape, dtype=torch.bool),
    )
    found = refine(physics, scenes, start, replacements=0).positions
    assert bool((found.azimuth_rad.abs() <= math.radians(60) + ANGLE_MARGIN_RAD + 1e-6).all())
    assert bool((found.elevation_rad.abs() <= math.radians(30) + ANGLE_MARGIN_RAD + 1e-6).all())
    assert bool((found.range_m >= 1 / RANGE_MARGIN - 1e-6).all())
    assert bool((found.range_m <= 10 * RANGE_MARGIN + 1e-5).all())


@pytest.mark.parametrize("symbols", MODELS)
def test_fits_do_not_depend_on_chunks(symbols: SymbolModel) -> None:
    """Scenes fitted one by one and all together end in the same places."""
    physics, scenes = drawn(symbols, 8, snr_db=20.0, most=2)
    start = shifted(true_positions(scenes), angle_rad=math.radians(1))
    alone = refine(physics, scenes, start, chunk=1)
    together = refine(physics, scenes, start, chunk=8)
    torch.testing.assert_close(alone.misfit, together.misfit, rtol=1e-3, atol=0)
    found = maximum_likelihood(physics, scenes, scenes.num_sources, chunk=1)
    same = maximum_likelihood(physics, scenes, scenes.num_sources, chunk=8)
    torch.testing.assert_close(found.misfit, same.misfit, rtol=1e-3, atol=0)


def test_slots_keep_their_sources() -> None:
    """Sources come back in the slots they came in, whatever their order and the gaps between them."""
    physics, scenes = drawn("constant", snr_db=20.0)
    truth = true_positions(scenes)
    flipped = Positions(**{name: getattr(truth, name).flip(1) for name in truth.__slots__})
    straight = refine(physics, scenes, truth, replacements=0)
    turned = refine(physics, scenes, flipped, replacements=0)
    torch.testing.assert_close(turned.misfit, straight.misfit, rtol=1e-3, atol=0)
    assert torch.equal(turned.positions.active, truth.active.flip(1))
    error = (turned.positions.azimuth_rad.flip(1) - truth.azimuth_rad).abs()
    assert float(error[truth.active].median()) < math.radians(0.5)


def test_a_scene_without_sources_keeps_none() -> None:
    """A start that says "no source" is a fit of nothing: all energy is left."""
    physics, scenes = drawn("iid", 6)
    truth = true_positions(scenes)
    active = truth.active.clone()
    active[2] = False
    fit = refine(physics, scenes, replace(truth, active=active))
    assert fit.positions.num_sources[2] == 0
    energy = scenes.snapshots[2].abs().square().sum() * 10 ** (scenes.snr_db[2] / 10)
    assert float(fit.misfit[2]) == pytest.approx(float(energy), rel=1e-4)
    assert bool(torch.isfinite(fit.positions.range_m).all())


def test_more_sources_explain_more_and_the_right_number_is_the_fit_for_it() -> None:
    """The misfit falls with the number of sources; each fit is that of its known number."""
    physics, scenes = drawn("constant", 10, snr_db=15.0, most=3)
    fits = fits_of_every_number(physics, scenes)
    misfits = torch.stack([fit.misfit for fit in fits])
    assert bool((misfits[1:] <= misfits[:-1] * 1.001).all())
    for number, fit in enumerate(fits, start=1):
        assert bool((fit.positions.num_sources == number).all())
    known = maximum_likelihood(physics, scenes, scenes.num_sources)
    chosen = misfits.gather(0, (scenes.num_sources - 1).unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(chosen, known.misfit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("symbols", MODELS)
def test_the_number_of_sources_is_found_where_noise_is_low(symbols: SymbolModel) -> None:
    """At 30 dB the criterion is right in at least four scenes of five."""
    physics, scenes = drawn(symbols, 12, snr_db=30.0, most=3)
    numbers = number_by_bic(physics, fits_of_every_number(physics, scenes))
    assert float((numbers == scenes.num_sources).double().mean()) >= 0.8


def test_noise_alone_is_one_source() -> None:
    """Fits of noise improve by less than a further source costs: the smallest number wins."""
    physics, scenes = drawn("iid", 6, snr_db=0.0, most=2)
    noise = torch.randn(
        6, 16, 16, dtype=torch.complex64, generator=torch.Generator().manual_seed(5)
    )
    fits = fits_of_every_number(physics, replace(scenes, snapshots=noise))
    assert number_by_bic(physics, fits).tolist() == [1] * 6


def _start_of(scenes: Scenes, count: int) -> Positions:
    return true_positions(scenes).select(slice(0, count))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, s: refine(p, s, _start_of(s, 2)), "positions of 2 scenes for 4"),
        (lambda p, s: refine(p, s, _start_of(s, 4), iterations=0), "iterations is 0"),
        (lambda p, s: refine(p, s, _start_of(s, 4), replacements=-1), "replacements is -1"),
        (lambda p, s: maximum_likelihood(p, s, s.num_sources[:2]), "expected \\(4,\\)"),
        (lambda p, s: maximum_likelihood(p, s, s.num_sources * 0), "expected 1 to 5"),
        (lambda p, s: maximum_likelihood(p, s, s.num_sources, chunk=0), "chunk is 0"),
        (lambda p, s: number_by_bic(p, []), "no fits were given"),
        (lambda p, s: GridShape(azimuths=0, elevations=1, ranges=1), "at least one point"),
    ],
)
def test_what_makes_no_sense_is_refused(
    call: Callable[[ScenePhysics, Scenes], LikelihoodFit], message: str
) -> None:
    """Every wrong argument is named in one sentence."""
    with pytest.raises(ValueError, match=message):
        call(*drawn("constant", 4))


def test_a_start_that_is_not_a_number_is_refused() -> None:
    """A NaN would compare as not better, and come back as if it had been fitted."""
    physics, scenes = drawn("constant", 4)
    start = true_positions(scenes)
    azimuth = start.azimuth_rad.clone()
    azimuth[1, 0] = math.nan
    with pytest.raises(ValueError, match="1 active sources of the start are NaN"):
        refine(physics, scenes, replace(start, azimuth_rad=azimuth))


@pytest.mark.gpu
def test_the_fits_are_those_of_the_cpu() -> None:
    """On CUDA the same scenes have the same fits."""
    physics, scenes = drawn("iid", 12, snr_db=15.0)
    here = maximum_likelihood(physics, scenes, scenes.num_sources)
    there = maximum_likelihood(physics, scenes.to("cuda"), scenes.num_sources.to("cuda"))
    close = (here.misfit - there.misfit.cpu()).abs() < 1
    assert float(close.double().mean()) >= 0.9

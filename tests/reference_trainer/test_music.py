"""MUSIC finds what is in a covariance: exactly, in any scene, as a loop over single places does."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference_trainer.covariance import factor_of
from reference_trainer.geometry import steering_vectors
from reference_trainer.matching import source_errors
from reference_trainer.music import music, pseudo_spectrum
from reference_trainer.null_descent import descend, steering_with_slopes
from reference_trainer.physics import ScenePhysics
from reference_trainer.positions import Positions, true_positions
from reference_trainer.scenes import Scenes, draw_scenes
from reference_trainer.search_grid import place_bounds, search_grid
from tests.reference_trainer.localisation_oracles import (
    music_point_by_point,
    noise_subspace,
    null,
    steering,
)

PHYSICS = ScenePhysics()
CPU = torch.device("cpu")


def drawn(count: int, *, seed: int = 0, physics: ScenePhysics = PHYSICS) -> Scenes:
    """Scenes of which only the truth is used."""
    return draw_scenes(physics, seed=seed, split="validation", indices=range(count), estimate=False)


def worst(estimated: Positions, true: Positions) -> tuple[float, float]:
    """Largest error of an angle in degrees and of an inverse range in 1/m; NaN if one is missed."""
    errors = source_errors(estimated, true)
    angle = np.degrees(np.maximum(np.abs(errors.azimuth_rad), np.abs(errors.elevation_rad)))
    range_m = true.range_m[true.active].double().numpy()
    return float(angle.max()), float(np.abs(1 / (range_m + errors.range_m) - 1 / range_m).max())


def exact_factor(places: Tensor, power: Tensor) -> Tensor:
    """Factor ``[1, N, K]`` of sources at ``places`` ``[K, 3]`` (azimuth, elevation, range)."""
    return (steering_vectors(PHYSICS, *places.unbind(-1)).mT * power.sqrt())[None]


def positions(places: Tensor) -> Positions:
    """One scene with a source at each of ``places`` ``[K, 3]``."""
    azimuth, elevation, range_m = places.unsqueeze(0).unbind(-1)
    return Positions(
        azimuth_rad=azimuth,
        elevation_rad=elevation,
        range_m=range_m,
        active=torch.ones_like(azimuth, dtype=torch.bool),
    )


def test_every_source_of_an_exact_covariance_is_found() -> None:
    """In 400 random scenes of 1 to 5 sources no source is missed, however weak or close to another."""
    scenes = drawn(400)
    found = music(PHYSICS, scenes.true_factor, scenes.num_sources)
    assert torch.equal(found.num_sources, scenes.num_sources)
    angle_deg, inverse_range = worst(found, true_positions(scenes))
    assert angle_deg < 0.05
    assert inverse_range < 0.01


angles = st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.1, 1.0))


@settings(max_examples=40)
@given(st.lists(angles, min_size=1, max_size=5), st.integers(0, 10**6))
def test_any_sources_that_differ_are_found(units, seed) -> None:
    """Wherever sources stand, with powers over 26 dB: two in one beam are found as well."""
    places = torch.tensor(units, dtype=torch.float64)
    places = places * torch.tensor([math.radians(60), math.radians(30), 1.0], dtype=torch.float64)
    places[:, 2] = 1 / places[:, 2]
    vectors = steering_vectors(PHYSICS, *places.unbind(-1))
    if len(units) > 1:
        likeness = (vectors.conj() @ vectors.mT).abs() - torch.eye(len(units))
        if likeness.max() > 0.95:  # nearer than a tenth of a beam: two sources are almost one
            return
    generator = torch.Generator().manual_seed(seed)
    power = 10 ** (-2.6 * torch.rand(len(units), generator=generator, dtype=torch.float64))
    found = music(PHYSICS, exact_factor(places, power), torch.tensor([len(units)]))
    angle_deg, inverse_range = worst(found, positions(places))
    assert angle_deg < 0.05
    assert inverse_range < 0.01


@pytest.mark.parametrize("columns", [1, 5, 16, 200])
def test_a_factor_and_its_covariance_give_the_same_places(columns: int) -> None:
    """However many columns a factor has, only F F^H counts: a dense covariance is taken as well."""
    scenes = drawn(6)
    generator = torch.Generator().manual_seed(columns)
    mixing = torch.randn(6, 5, columns, dtype=torch.complex128, generator=generator)
    factor = scenes.true_factor.to(torch.complex128) @ mixing
    counts = scenes.num_sources.clamp_max(columns)
    one = music(PHYSICS, factor, counts)
    other = music(PHYSICS, factor_of(factor @ factor.mH), counts)
    assert max(worst(one, other)) < 1e-3


def test_a_loop_over_single_places_finds_the_same() -> None:
    """With noise in the covariance a textbook loop over the same grid ends in the same minima."""
    scenes = drawn(3, seed=4, physics=ScenePhysics(max_sources=1))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3, 144, 40, dtype=torch.complex128, generator=generator)
    factor = torch.cat((scenes.true_factor.to(torch.complex128), 0.1 * noise), dim=-1)
    found = music(PHYSICS, factor, scenes.num_sources)
    grid = search_grid(PHYSICS, oversampling=1.5, device=CPU)
    places = [
        (azimuth, elevation, 1 / inverse) for azimuth, elevation, inverse in grid.places.tolist()
    ]
    vectors = [steering(PHYSICS, *place) for place in places]
    for scene in range(3):
        matrix = (factor[scene] @ factor[scene].mH).numpy()
        (azimuth, elevation, range_m), *_ = music_point_by_point(
            PHYSICS, matrix, 1, places, vectors
        )
        assert found.azimuth_rad[scene, 0].item() == pytest.approx(azimuth, abs=2e-3)
        assert found.elevation_rad[scene, 0].item() == pytest.approx(elevation, abs=2e-3)
        assert 1 / found.range_m[scene, 0].item() == pytest.approx(1 / range_m, abs=1e-2)


def test_the_pseudo_spectrum_is_that_of_the_noise_subspace() -> None:
    """One over the power of a steering vector in the noise subspace, by its 144 eigenvectors."""
    scenes = drawn(2, seed=2)
    place = (torch.tensor([0.3, -0.5]), torch.tensor([0.1, 0.2]), torch.tensor([2.0, 5.0]))
    spectrum = pseudo_spectrum(
        PHYSICS,
        scenes.true_factor,
        scenes.num_sources,
        azimuth_rad=place[0],
        elevation_rad=place[1],
        range_m=place[2],
    )
    for scene in range(2):
        factor = scenes.true_factor[scene].to(torch.complex128)
        noise = noise_subspace((factor @ factor.mH).numpy(), int(scenes.num_sources[scene]))
        for index, point in enumerate(torch.stack(place, -1).tolist()):
            expected = 1 / null(PHYSICS, noise, tuple(point))
            assert spectrum[scene, index].item() == pytest.approx(expected, rel=1e-3)


def test_slopes_are_derivatives() -> None:
    """The slopes of steering vectors agree with central differences."""
    lowest, highest = place_bounds(PHYSICS)
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(20, 3, dtype=torch.float64, generator=generator)
    places = lowest + (highest - lowest) * unit
    _, slopes = steering_with_slopes(PHYSICS, places)
    for axis in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = 1e-6
        ahead, behind = (steering_with_slopes(PHYSICS, places + s)[0] for s in (step, -step))
        torch.testing.assert_close(slopes[..., axis], (ahead - behind) / 2e-6, rtol=0, atol=1e-7)


def test_descending_never_climbs_and_never_leaves_the_field_of_view() -> None:
    """From any start the null spectrum falls, and the place stays within the bounds."""
    scenes = drawn(40, seed=7)
    basis = scenes.true_basis.to(torch.complex128)
    none = basis[..., :0]
    lowest, highest = place_bounds(PHYSICS)
    unit = torch.rand(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    start = lowest + (highest - lowest) * unit
    steps = [descend(PHYSICS, start, signal=basis, found=none, iterations=n)[0] for n in range(8)]
    inside = [
        (basis.mH @ steering_with_slopes(PHYSICS, here)[0].unsqueeze(-1)).abs().square().sum((1, 2))
        for here in steps
    ]
    for before, after in pairwise(inside):
        assert (after >= before - 1e-12).all()
    assert ((steps[-1] >= lowest) & (steps[-1] <= highest)).all()


def test_coherent_sources_are_found_one_after_the_other() -> None:
    """A field with no noise, one column for all sources: the strongest are found nevertheless.

    A rule that only suppresses the neighbourhood of a peak takes its side lobes for sources.
    """
    places = torch.tensor([[-0.6, 0.1, 2.0], [0.0, -0.2, 4.0], [0.5, 0.3, 8.0]]).double()
    field = exact_factor(places, torch.tensor([1.0, 0.8, 0.6])).sum(-1, keepdim=True)
    found = music(PHYSICS, field, torch.tensor([3]))
    assert worst(found, positions(places))[0] < 1.5


def test_a_scene_does_not_depend_on_its_neighbours() -> None:
    """Chunks and the order of the scenes change nothing but rounding errors."""
    scenes = drawn(20, seed=8)
    whole = music(PHYSICS, scenes.true_factor, scenes.num_sources)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = music(PHYSICS, scenes.true_factor[order], scenes.num_sources[order], chunk_scenes=3)
    assert max(worst(shuffled, whole.select(order))) < 1e-3


def test_no_sources_are_no_positions() -> None:
    """A scene said to be empty gets no source, and one without power gets finite ones."""
    scenes = drawn(3)
    found = music(PHYSICS, scenes.true_factor, torch.tensor([0, 2, 0]))
    assert found.num_sources.tolist() == [0, 2, 0]
    assert not len(music(PHYSICS, scenes.true_factor[:0], torch.zeros(0, dtype=torch.int64)))
    silent = music(PHYSICS, torch.zeros_like(scenes.true_factor), torch.tensor([1, 5, 0]))
    assert silent.num_sources.tolist() == [1, 5, 0]
    assert torch.isfinite(silent.range_m).all()
    assert torch.isfinite(silent.azimuth_rad).all()


@pytest.mark.parametrize(
    ("factor", "counts", "message"),
    [
        (torch.zeros(2, 100, 3), torch.ones(2, dtype=torch.int64), r"expected \[B, 144, n\]"),
        (torch.zeros(2, 144, 3), torch.tensor([1, 6]), "at most 5"),
        (torch.zeros(2, 144, 3), torch.tensor([-1, 2]), "0 or more"),
        (torch.zeros(2, 144, 3), torch.tensor([1.0, 2.0]), "expected integers"),
        (
            torch.zeros(2, 144, 3),
            torch.tensor([1]),
            r"1 numbers of sources; expected \[B, 144, n\] and",
        ),
        (torch.full((1, 144, 3), math.nan), torch.tensor([1]), "NaN or Inf"),
    ],
)
def test_what_cannot_be_searched_is_refused(factor, counts, message) -> None:
    """Wrong shapes, wrong counts and NaN are errors that say what was expected."""
    with pytest.raises(ValueError, match=message):
        music(PHYSICS, factor.to(torch.complex64), counts)


@pytest.mark.gpu
def test_cuda_finds_what_the_cpu_finds() -> None:
    """The device changes rounding errors only, and the positions lie on it."""
    scenes = drawn(30, seed=9)
    here = music(PHYSICS, scenes.true_factor, scenes.num_sources)
    there = music(PHYSICS, scenes.true_factor.cuda(), scenes.num_sources.cuda())
    assert there.azimuth_rad.is_cuda
    assert max(worst(there.to("cpu"), here)) < 1e-2

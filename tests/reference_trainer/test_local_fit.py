"""A covariance fitted around proposed places: finer than the grid, and deaf to wrong proposals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reference_trainer.factors import gram, squared_norm
from reference_trainer.local_fit import locally_fitted_factor
from reference_trainer.matching import source_errors
from reference_trainer.music import music
from reference_trainer.physics import ScenePhysics
from reference_trainer.positions import Positions, true_positions
from reference_trainer.sample_covariance import fitted_factor
from reference_trainer.scenes import draw_scenes

COUNT = 24


def drawn(symbols, **physics):
    """Physics and scenes."""
    found = ScenePhysics(symbols=symbols, **physics)
    return found, draw_scenes(found, seed=3, split="test", indices=range(COUNT))


def shifted(positions, degrees):
    """The positions, each moved by about as many degrees."""
    generator = torch.Generator().manual_seed(0)
    sign = torch.randn(2, *positions.active.shape, generator=generator).sign()
    offset = torch.tensor(degrees).deg2rad() * 2**-0.5
    return replace(
        positions,
        azimuth_rad=positions.azimuth_rad + sign[0] * offset,
        elevation_rad=positions.elevation_rad + sign[1] * offset,
    )


def median_deg(positions, scenes):
    """Median of the azimuth errors."""
    errors = source_errors(positions, true_positions(scenes))
    return torch.from_numpy(errors.azimuth_rad).abs().nanmedian().rad2deg().item()


@pytest.mark.parametrize("symbols", ["constant", "iid"])
def test_it_is_finer_than_the_fit_on_the_whole_grid(symbols):
    """Proposals a degree off leave less than half of the error of the coarse dictionary at 20 dB."""
    physics, scenes = drawn(symbols, min_snr_db=20.0, max_snr_db=20.0)
    coarse = median_deg(music(physics, fitted_factor(physics, scenes), scenes.num_sources), scenes)
    factor = locally_fitted_factor(physics, scenes, [shifted(true_positions(scenes), 1.0)])
    assert median_deg(music(physics, factor, scenes.num_sources), scenes) < 0.5 * coarse


@pytest.mark.parametrize("symbols", ["constant", "iid"])
def test_wrong_proposals_lose_their_power(symbols):
    """Five places where nothing is beside the right ones hardly change the signal subspace."""
    physics, scenes = drawn(symbols, min_snr_db=15.0, max_snr_db=20.0)
    right = true_positions(scenes)
    generator = torch.Generator().manual_seed(1)
    random = torch.rand(3, *right.active.shape, generator=generator)
    wrong = Positions(
        azimuth_rad=2 * random[0] - 1,
        elevation_rad=random[1] - 0.5,
        range_m=1 + 9 * random[2],
        active=torch.ones_like(right.active),
    )
    factor = locally_fitted_factor(physics, scenes, [right, wrong])
    inside = squared_norm(gram(scenes.true_basis, factor)) / squared_norm(factor)
    assert inside.median() > 0.95


def test_inactive_slots_take_no_part():
    """What an inactive slot holds does not matter to the bit, zeros of padding included."""
    physics, scenes = drawn("constant")
    right = true_positions(scenes)
    filled = replace(right, range_m=torch.where(right.active, right.range_m, 7.0))
    both = [locally_fitted_factor(physics, scenes, [one]) for one in (right, filled)]
    assert torch.equal(*both)
    assert both[0].isfinite().all()


def test_the_factor_has_trace_n_and_does_not_depend_on_chunks():
    """Any chunking gives the same covariance to rounding, of trace N."""
    physics, scenes = drawn("iid")
    whole = locally_fitted_factor(physics, scenes, [true_positions(scenes)], chunk_scenes=COUNT)
    parts = locally_fitted_factor(physics, scenes, [true_positions(scenes)], chunk_scenes=7)
    assert torch.allclose(squared_norm(whole), torch.full((COUNT,), 144.0), rtol=1e-5)
    assert torch.allclose(whole @ whole.mH, parts @ parts.mH, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proposals": []}, "none were given"),
        ({"rounds": 0}, "rounds is 0; expected at least 1"),
        ({"columns": 0}, "columns is 0"),
    ],
)
def test_bad_input_is_refused(change, message):
    """Each option is checked where it enters, with one sentence."""
    physics, scenes = drawn("constant")
    given = {"proposals": [true_positions(scenes)], **change}
    with pytest.raises(ValueError, match=message):
        locally_fitted_factor(physics, scenes, given.pop("proposals"), **given)


def test_proposals_for_other_scenes_are_refused():
    """One row a scene is expected."""
    physics, scenes = drawn("constant")
    with pytest.raises(ValueError, match="proposals for 3 scenes, expected 24"):
        locally_fitted_factor(physics, scenes, [true_positions(scenes.select(slice(0, 3)))])

"""Scenes on the fly never come again, and varied scenes keep their physics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradguard as gg
from reference_trainer.data import batches, draw_data, eased, first_number
from reference_trainer.geometry import element_positions_m, steering_vectors
from reference_trainer.physics import ScenePhysics
from reference_trainer.reporting import SilentView
from reference_trainer.scenes import Scenes, draw_scenes, fingerprint
from reference_trainer.settings import preset, with_overrides
from reference_trainer.synthesis import element_offsets_m
from reference_trainer.train import resume, train
from reference_trainer.variates import draw_variates

if TYPE_CHECKING:
    from pathlib import Path

    from reference_trainer.results import EpochResult

CPU = torch.device("cpu")
SETTINGS = [
    "scenes.source=fly",
    "scenes.train=4",
    "scenes.validation=2",
    "optimization.batch_scenes=2",
    "optimization.epochs=3",
    "network.dropout=0.1",
    "runtime.device=cpu",
    "runtime.state_every=3",
    "runtime.evaluate_every=3",
]


def drawn(count: int = 24, **options: object) -> Scenes:
    """Draw a few training scenes."""
    return draw_scenes(ScenePhysics(**options), seed=3, split="train", indices=range(count))


def test_no_scene_comes_twice() -> None:
    """Over epochs every scene is new, none is held out, and the numbers leave no gap."""
    data = draw_data(with_overrides(preset("smoke"), SETTINGS).scenes, device=CPU)
    seen: list[str] = []
    numbers: list[int] = []
    for epoch in (1, 2, 3):
        first = first_number(data.training, epoch)
        for index in batches(4, batch_scenes=2, seed=0, epoch=epoch, first=first):
            numbers += index.tolist()
            seen += fingerprint(data.training.select(index).scenes)
    assert sorted(numbers) == list(range(12))
    assert len({*seen, *fingerprint(data.held_out.scenes)}) == 12 + 2
    assert set(fingerprint(data.memorised.scenes)) < set(seen)


class Stopped(BaseException):
    """Ends a run in the middle."""


class Stopper(SilentView):
    """Ends the run after the second epoch."""

    def epoch_ended(self, result: EpochResult) -> None:
        """Stop there."""
        if result.epoch == 2:
            raise Stopped


def test_a_resumed_run_goes_on_with_the_scenes_that_were_left(tmp_path: Path) -> None:
    """Killed in the second epoch and resumed, fresh scenes lead to the bits of the whole run, and
    the guard finds nothing in it.
    """
    config = with_overrides(preset("smoke"), SETTINGS)
    whole = train(config)
    assert whole.log.findings == ()
    assert gg.diagnose(whole.log).healthy
    assert (whole.start.source, whole.start.planned_steps) == ("fly", 6)
    with pytest.raises(Stopped):
        train(config, run_directory=tmp_path / "run", view=Stopper())
    again = resume(tmp_path / "run")
    assert again.start.steps_taken == 3
    assert all(map(torch.equal, again.model.parameters(), whole.model.parameters()))


def test_more_scenes_than_a_seed_has_are_refused() -> None:
    """Numbers of scenes end at 2**32: a longer run is refused before it starts."""
    with pytest.raises(ValueError, match=r"the 2\*\*32 scenes that a seed has"):
        with_overrides(preset("smoke"), ["scenes.train=2000000000", "optimization.epochs=3"])


def test_a_curriculum_lowers_the_noise_floor_in_a_line() -> None:
    """From 15 dB in the first epoch to that of the physics, where it stays, while the sources rise from
    one to all; held-out scenes are the same with and without it.
    """
    physics = ScenePhysics()
    steps = [eased(physics, done, 4) for done in range(7)]
    assert [one.min_snr_db for one in steps] == [15.0, 10.0, 5.0, 0.0, -5.0, -5.0, -5.0]
    assert [one.drawn_sources for one in steps] == [1, 2, 3, 4, 5, 5, 5]
    assert eased(physics, 0, 0) == eased(physics, 4, 4) == physics
    plain = draw_data(with_overrides(preset("smoke"), SETTINGS).scenes, device=CPU)
    settings = [*SETTINGS, "scenes.curriculum_epochs=2"]
    easy = draw_data(with_overrides(preset("smoke"), settings).scenes, device=CPU)
    assert torch.equal(easy.held_out.scenes.snapshots, plain.held_out.scenes.snapshots)
    for epoch, lowest_db, most in ((0, 15.0, 1), (1, 5.0, 3), (2, -5.0, 5)):
        index = torch.arange(4) + 4 * epoch
        one, other = (data.training.select(index).scenes for data in (easy, plain))
        assert (one.snr_db >= lowest_db).all()
        unit = (other.snr_db + 5.0) / 25.0
        assert torch.allclose(one.snr_db, lowest_db + unit * (20.0 - lowest_db), atol=1e-4)
        assert most < 5 or torch.equal(one.true_factor, other.true_factor)
        assert one.num_sources.max() <= most


def test_a_curriculum_needs_fresh_scenes() -> None:
    """The same scenes in every epoch cannot become harder: one sentence says what to set."""
    with pytest.raises(ValueError, match=r"set scenes\.source=fly"):
        with_overrides(preset("smoke"), ["scenes.curriculum_epochs=2"])


def test_variation_leaves_the_rest_of_a_scene_alone() -> None:
    """With and without it a scene has the same sources, noise level and scattering."""
    plain = drawn()
    varied = drawn(element_jitter=0.05, code_bits_drop=2)
    for name in ("num_sources", "azimuth_rad", "elevation_rad", "range_m", "snr_db"):
        assert torch.equal(getattr(plain, name), getattr(varied, name))
    assert not torch.equal(plain.true_factor, varied.true_factor)


def test_dropped_bits_are_uniform_over_scenes() -> None:
    """Each scene has 8, 4 or 2 phases, all of them among the 8; each resolution comes up."""
    codes = drawn(60, code_bits_drop=2).codes
    levels = torch.round(codes.angle() * 4 / math.pi).to(torch.int64) % 8
    kinds = [len(scene.unique()) for scene in levels]
    assert set(kinds) == {2, 4, 8}
    assert all(10 < kinds.count(kind) < 30 for kind in (2, 4, 8))
    for scene, kind in zip(levels, kinds, strict=True):
        assert (scene % (8 // kind) == 0).all()


@given(
    azimuth=st.floats(-1.0, 1.0),
    elevation=st.floats(-0.5, 0.5),
    range_m=st.floats(1.0, 10.0),
    seed=st.integers(0, 99),
)
def test_displaced_elements_answer_from_where_they_are(
    azimuth: float, elevation: float, range_m: float, seed: int
) -> None:
    """The phase of each element is its own exact distance to the source, computed one by one."""
    physics = ScenePhysics()
    generator = np.random.default_rng(seed)
    offsets = generator.uniform(-0.0075, 0.0075, (2, 144))
    position = (torch.tensor(value, dtype=torch.float64) for value in (azimuth, elevation, range_m))
    moved = torch.from_numpy(offsets[0]), torch.from_numpy(offsets[1])
    response = steering_vectors(physics, *position, offsets_m=moved).numpy()
    x_m, y_m = (part.double().numpy() for part in element_positions_m(physics))
    source = range_m * np.array(
        [
            math.sin(azimuth) * math.cos(elevation),
            math.sin(elevation),
            math.cos(azimuth) * math.cos(elevation),
        ]
    )
    for number in range(0, 144, 13):
        element = np.array([x_m[number] + offsets[0, number], y_m[number] + offsets[1, number], 0])
        path_m = np.linalg.norm(source - element) - range_m
        expected = np.exp(-2j * math.pi / 0.3 * path_m) / 12
        assert response[number] == pytest.approx(expected, abs=1e-6)


def test_elements_are_displaced_within_the_limit() -> None:
    """Displacements fill plus and minus eta half-wavelengths along both axes, and differ by scene."""
    physics = ScenePhysics(element_jitter=0.05)
    variates = draw_variates(physics, [(3, 0, number) for number in range(30)])
    offsets = element_offsets_m(physics, variates)
    assert offsets is not None
    for along in offsets:
        assert along.shape == (30, 144)
        assert 0.98 * 0.0075 < along.abs().max() <= 0.0075
        assert along.mean().abs() < 3e-4
    assert not torch.equal(offsets[0][0], offsets[0][1])
    assert not torch.equal(offsets[0], offsets[1])


@pytest.mark.parametrize("symbols", ["constant", "iid"])
def test_the_truth_is_displaced_as_what_is_received(symbols: str) -> None:
    """Without noise the snapshots lie in the span of the displaced true steering vectors seen
    through the channel; with elements where they should be, they do not.
    """
    clean = {"min_snr_db": 140.0, "max_snr_db": 140.0, "symbols": symbols}
    scenes = drawn(12, element_jitter=0.3, **clean)
    nominal = replace(scenes, true_factor=drawn(12, **clean).true_factor)
    assert unexplained(scenes).max() < 1e-3
    assert unexplained(nominal).min() > 0.02
    aligned = scenes.true_factor - scenes.true_basis @ (scenes.true_basis.mH @ scenes.true_factor)
    assert aligned.norm() < 1e-3 * scenes.true_factor.norm()


def unexplained(scenes: Scenes) -> torch.Tensor:
    """Return the share of each scene's snapshots outside the span of its true steering vectors."""
    sensing = scenes.channel.unsqueeze(1) * scenes.codes.unsqueeze(2)  # [B, L, M, N]
    seen = (sensing @ scenes.true_factor.unsqueeze(1)).to(torch.complex128)  # [B, L, M, K]
    received = scenes.snapshots.to(torch.complex128).unsqueeze(-1)
    symbols = torch.linalg.pinv(seen, rtol=1e-6) @ received
    left = received - seen @ symbols
    return left.flatten(1).norm(dim=1) / received.flatten(1).norm(dim=1)


@pytest.mark.parametrize(
    "options", [{"element_jitter": -0.1}, {"element_jitter": 1.0}, {"code_bits_drop": 3}]
)
def test_variation_out_of_bounds_is_refused(options: dict[str, float]) -> None:
    """A negative or whole displacement and codes without bits are one sentence."""
    with pytest.raises(ValueError, match="scene physics: "):
        ScenePhysics(**options)

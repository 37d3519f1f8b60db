"""A data set is a function of (seed, split, index), and its scenes are what they say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_trainer.geometry import steering_vectors
from reference_trainer.physics import ScenePhysics
from reference_trainer.scenes import Scenes, Split, draw_scenes, fingerprint

MODELS = [ScenePhysics(symbols="constant"), ScenePhysics(symbols="iid")]
SPLITS: list[Split] = ["train", "validation", "test"]
# (azimuth_rad, elevation_rad, range_m) of the sources of training scene 4 under seed 0
PINNED = [
    [-0.8549244, 0.0236446, 3.3162925],
    [-0.2584796, -0.2844805, 9.6691313],
    [0.1666485, 0.1906958, 5.6243649],
]
both_models = pytest.mark.parametrize("physics", MODELS, ids=lambda p: p.symbols)


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: p.symbols)
def drawn(request: pytest.FixtureRequest) -> tuple[ScenePhysics, Scenes]:
    """400 training scenes of either symbol model."""
    physics: ScenePhysics = request.param
    return physics, draw_scenes(physics, seed=0, split="train", indices=range(400))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two torch threads for the time of a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def differing(first: Scenes, second: Scenes) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    names = [field.name for field in fields(Scenes)]
    return [name for name in names if not torch.equal(getattr(first, name), getattr(second, name))]


@pytest.mark.parametrize("physics", MODELS, ids=lambda p: p.symbols)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_chunking_gives_the_same_bits(physics: ScenePhysics, data: st.DataObject) -> None:
    """However the indices are cut and ordered, each scene has the same bits in every tensor."""
    indices = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40, unique=True))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(indices)), max_size=4)) | {len(indices)})
    order = data.draw(st.permutations(range(len(indices))))
    whole = draw_scenes(physics, seed=3, split="train", indices=indices)
    starts = [0, *cuts[:-1]]
    for start, stop in zip(starts, cuts, strict=True):
        chunk = order[start:stop]
        part = draw_scenes(physics, seed=3, split="train", indices=[indices[i] for i in chunk])
        assert differing(part, whole.select(torch.tensor(chunk))) == []


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_changes_no_bit(drawn: tuple[ScenePhysics, Scenes]) -> None:
    """What was drawn with the threads of the suite is drawn again, bit for bit, with two."""
    physics, scenes = drawn
    again = draw_scenes(physics, seed=0, split="train", indices=range(37))
    assert differing(again, scenes.select(slice(0, 37))) == []
    assert torch.get_num_threads() == 2


def test_no_scene_is_shared_by_two_splits_or_seeds() -> None:
    """400 scenes of each split under two seeds, with the offsets of the published leak, all differ."""
    physics = ScenePhysics()
    marks = [
        mark
        for seed in (0, 123)
        for split in SPLITS
        for mark in fingerprint(
            draw_scenes(physics, seed=seed, split=split, indices=range(400), estimate=False)
        )
    ]
    assert len(set(marks)) == len(marks) == 2400


def test_the_fingerprint_sees_the_sources_and_nothing_else() -> None:
    """The same sources under other noise are one scene; a source moved by a bit is another."""
    physics = ScenePhysics()
    scenes = draw_scenes(physics, seed=0, split="train", indices=range(3), estimate=False)
    noisy = replace(scenes, snapshots=scenes.snapshots + 1)
    assert fingerprint(noisy) == fingerprint(scenes)
    farther = replace(scenes, range_m=torch.nextafter(scenes.range_m, torch.tensor(99.0)))
    assert not set(fingerprint(farther)) & set(fingerprint(scenes))
    assert fingerprint(scenes.select(torch.tensor([2, 0]))) == [
        fingerprint(scenes)[2],
        fingerprint(scenes)[0],
    ]


def test_a_scene_keeps_its_meaning_between_versions() -> None:
    """Scene 4 of seed 0 has held these sources since the first release."""
    scenes = draw_scenes(ScenePhysics(), seed=0, split="train", indices=[4], estimate=False)
    truth = torch.stack((scenes.azimuth_rad, scenes.elevation_rad, scenes.range_m))[:, 0]
    count = int(scenes.num_sources)
    assert truth[:, :count].T.tolist() == [pytest.approx(row, abs=1e-6) for row in PINNED]


@both_models
def test_shapes_and_dtypes(physics: ScenePhysics) -> None:
    """Every tensor has the documented shape and dtype, and is contiguous."""
    scenes = draw_scenes(physics, seed=0, split="test", indices=[7, 9])
    draws = physics.symbol_draws
    expected = {
        "snapshots": ((2, 16, 16), torch.complex64),
        "codes": ((2, 16, 144), torch.complex64),
        "channel": ((2, 16, 144), torch.complex64),
        "snr_db": ((2,), torch.float32),
        "num_sources": ((2,), torch.int64),
        "azimuth_rad": ((2, 5), torch.float32),
        "elevation_rad": ((2, 5), torch.float32),
        "range_m": ((2, 5), torch.float32),
        "active": ((2, 5), torch.bool),
        "true_factor": ((2, 144, 5), torch.complex64),
        "true_basis": ((2, 144, 5), torch.complex64),
        "estimate": ((2, 144, draws), torch.complex64),
    }
    found = {name: getattr(scenes, name) for name in expected}
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == expected
    assert [field.name for field in fields(Scenes)] == list(expected)
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_sources_stand_where_the_physics_allows(drawn: tuple[ScenePhysics, Scenes]) -> None:
    """One to five sources, sorted by azimuth, inside the field of view; empty slots hold zeros."""
    physics, scenes = drawn
    assert set(scenes.num_sources.tolist()) == {1, 2, 3, 4, 5}
    assert torch.equal(scenes.active.sum(dim=1), scenes.num_sources)
    assert torch.equal(scenes.active, scenes.active.sort(dim=1, descending=True).values)
    reach = scenes.azimuth_rad.abs().max().item(), scenes.elevation_rad.abs().max().item()
    assert 0.98 < reach[0] / math.radians(physics.azimuth_half_width_deg) <= 1 + 1e-6
    assert 0.98 < reach[1] / math.radians(physics.elevation_half_width_deg) <= 1 + 1e-6
    ranges = scenes.range_m[scenes.active]
    assert 1 <= ranges.min() < 1.1
    assert 9.9 < ranges.max() <= 10
    steps = scenes.azimuth_rad.diff(dim=1)[scenes.active[:, 1:]]
    assert (steps >= 0).all()
    for padded in (scenes.azimuth_rad, scenes.elevation_rad, scenes.range_m):
        assert (padded[~scenes.active] == 0).all()


def test_numbers_are_uniform(drawn: tuple[ScenePhysics, Scenes]) -> None:
    """Counts, SNR, azimuth, elevation and range have the means of their uniform distributions."""
    physics, scenes = drawn
    samples = {
        "count": (scenes.num_sources.double(), 1.0, 5.0),
        "snr": (scenes.snr_db.double(), physics.min_snr_db, physics.max_snr_db),
        "azimuth": (scenes.azimuth_rad[scenes.active].double(), -math.pi / 3, math.pi / 3),
        "elevation": (scenes.elevation_rad[scenes.active].double(), -math.pi / 6, math.pi / 6),
        "range": (scenes.range_m[scenes.active].double(), 1.0, 10.0),
    }
    for name, (values, low, high) in samples.items():
        error = values.mean() - (low + high) / 2
        standard_error = values.std() / math.sqrt(len(values))
        assert abs(error) < 4 * standard_error, name


def test_codes_are_random_and_quantised(drawn: tuple[ScenePhysics, Scenes]) -> None:
    """Every scene has its own codes: eight phases, each used equally often."""
    _, scenes = drawn
    steps = scenes.codes.angle() / (math.pi / 4)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
    shares = torch.bincount(steps.round().long().flatten() % 8, minlength=8) / steps.numel()
    torch.testing.assert_close(shares, torch.full((8,), 0.125), rtol=0, atol=0.002)
    assert len({code.numpy().tobytes() for code in scenes.codes}) == len(scenes)


def test_the_true_factor_is_steering_times_root_power(
    drawn: tuple[ScenePhysics, Scenes],
) -> None:
    """Columns are steering vectors at the stored positions, scaled to a covariance of trace 144."""
    physics, scenes = drawn
    safe_range_m = torch.where(scenes.active, scenes.range_m, 1.0)
    steering = steering_vectors(physics, scenes.azimuth_rad, scenes.elevation_rad, safe_range_m)
    norms = torch.linalg.vector_norm(scenes.true_factor, dim=1)
    expected = (steering * norms.unsqueeze(-1)).mT
    torch.testing.assert_close(scenes.true_factor, expected, rtol=0, atol=2e-6)
    trace = norms.square().sum(dim=1)
    torch.testing.assert_close(trace, torch.full_like(trace, 144.0), rtol=1e-5, atol=0)
    assert (norms[~scenes.active] == 0).all()
    assert (norms[scenes.active] > 0).all()


def test_powers_fall_with_the_square_of_the_range() -> None:
    """With many symbols the power of a source is its expected one, proportional to 1 / range^2."""
    scenes = draw_scenes(MODELS[1], seed=0, split="train", indices=range(100), estimate=False)
    power = torch.linalg.vector_norm(scenes.true_factor, dim=1).square()
    common = power * scenes.range_m.square()
    total = common.sum(dim=1, keepdim=True) / scenes.num_sources.unsqueeze(1)
    torch.testing.assert_close(common, total * scenes.active, rtol=1e-4, atol=1e-4)


def test_the_true_basis_spans_the_sources(drawn: tuple[ScenePhysics, Scenes]) -> None:
    """Active columns are orthonormal, inactive ones zero, and the true factor lies inside."""
    _, scenes = drawn
    gram = scenes.true_basis.mH @ scenes.true_basis
    identity = torch.diag_embed(scenes.active.to(torch.complex64))
    torch.testing.assert_close(gram, identity, rtol=0, atol=1e-5)
    inside = scenes.true_basis @ (scenes.true_basis.mH @ scenes.true_factor)
    torch.testing.assert_close(inside, scenes.true_factor, rtol=0, atol=1e-4)


def fitted(scenes: Scenes, scene: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Least-squares amplitudes of the true columns ``[K, S]``, the fit and the residual."""
    factor = scenes.true_factor[scene][:, scenes.active[scene]].to(torch.complex128)
    channel, codes = (t[scene].to(torch.complex128) for t in (scenes.channel, scenes.codes))
    sensed = torch.einsum("mn,ln,nk->lmk", channel, codes, factor)
    measured = scenes.snapshots[scene].to(torch.complex128)
    if scenes.estimate.shape[-1] == 1:
        sensed, measured = sensed.flatten(0, 1).unsqueeze(0), measured.reshape(1, -1)
    amplitudes = torch.linalg.lstsq(sensed, measured.unsqueeze(-1)).solution
    fit = (sensed @ amplitudes).squeeze(-1)
    return amplitudes.squeeze(-1), fit, measured - fit


def test_snapshots_are_the_model_plus_noise_at_the_stated_snr(
    drawn: tuple[ScenePhysics, Scenes],
) -> None:
    """The truth explains the snapshots up to noise of the stated power, and has unit power itself.

    Residual degrees of freedom: 256 real pairs less one fitted amplitude for each source and draw.
    """
    physics, scenes = drawn
    ratios, powers = [], []
    for scene in range(100):
        _, fit, residual = fitted(scenes, scene)
        freedom = 256 - int(scenes.num_sources[scene]) * physics.symbol_draws
        noise = float(residual.abs().square().sum()) / freedom
        ratios.append(noise * 10 ** (float(scenes.snr_db[scene]) / 10))
        if scenes.snr_db[scene] > 15:
            powers.append(float(fit.abs().square().mean()))
    # 100 scenes of about 220 complex values: the mean has a standard error of 0.7 per cent.
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.03)
    assert sum(powers) / len(powers) == pytest.approx(1, abs=0.03)


def test_constant_symbols_fold_into_the_factor() -> None:
    """With one symbol each, the columns enter the snapshots with one common modulus."""
    physics = ScenePhysics(min_snr_db=80.0, max_snr_db=80.0, max_range_m=2.0)
    scenes = draw_scenes(physics, seed=0, split="train", indices=range(30))
    for scene in range(30):
        amplitudes = fitted(scenes, scene)[0].abs().flatten()
        torch.testing.assert_close(
            amplitudes, amplitudes.mean().expand_as(amplitudes), rtol=0.02, atol=0
        )


def test_the_symbol_model_changes_symbols_only() -> None:
    """Both models share sources, channel, codes and SNR of a scene."""
    constant, iid = (
        draw_scenes(physics, seed=0, split="train", indices=range(20)) for physics in MODELS
    )
    assert set(differing(constant, iid)) == {"snapshots", "true_factor", "estimate"}


def test_without_the_estimate_all_else_is_the_same(drawn: tuple[ScenePhysics, Scenes]) -> None:
    """``estimate=False`` leaves no columns and changes no other bit."""
    physics, scenes = drawn
    quick = draw_scenes(physics, seed=0, split="train", indices=range(400), estimate=False)
    assert quick.estimate.shape == (400, 144, 0)
    assert differing(quick, scenes) == ["estimate"]


def test_the_channel_has_unit_power_entries(drawn: tuple[ScenePhysics, Scenes]) -> None:
    """Over the scenes the mean power of an entry is 1."""
    _, scenes = drawn
    assert scenes.channel.abs().square().mean().item() == pytest.approx(1, abs=0.01)


def test_scenes_can_be_selected_and_moved() -> None:
    """Length, slices, index tensors and devices act on every tensor alike."""
    scenes = draw_scenes(ScenePhysics(), seed=0, split="train", indices=range(6))
    assert len(scenes) == 6
    assert len(scenes.select(slice(1, 3))) == 2
    picked = scenes.select(torch.tensor([5, 0]))
    assert differing(picked.select(torch.tensor([1])), scenes.select(slice(0, 1))) == []
    assert scenes.to("meta").true_basis.device.type == "meta"


def test_tensors_of_different_length_are_refused() -> None:
    """A batch whose tensors disagree on the number of scenes names them."""
    scenes = draw_scenes(ScenePhysics(), seed=0, split="train", indices=range(3), estimate=False)
    with pytest.raises(ValueError, match=r"disagree on the number of scenes.*'snr_db': 2"):
        replace(scenes, snr_db=scenes.snr_db[:2])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": -1}, "the seed is -1; expected 0 or more"),
        ({"split": "val"}, "the split is 'val'; expected one of 'train', 'validation', 'test'"),
        ({"indices": []}, "no indices were given; pass at least one"),
        ({"indices": [0, -3]}, "the indices reach from -3 to 0; expected 0 to"),
        ({"indices": [2**32]}, "the indices reach from 4294967296 to 4294967296; expected 0 to"),
    ],
)
def test_bad_requests_are_refused(change: dict[str, Any], sentence: str) -> None:
    """A seed, split or index that names no scene gets one sentence."""
    request: dict[str, Any] = {"seed": 0, "split": "train", "indices": [0]} | change
    with pytest.raises(ValueError, match=sentence):
        draw_scenes(ScenePhysics(), **request)

"""The Cramer-Rao bound against the full Fisher matrix, and against what maximum likelihood does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from reference_trainer.bound import cramer_rao_bound, sent_symbols
from reference_trainer.geometry import steering_vectors
from reference_trainer.physics import ScenePhysics, SymbolModel
from reference_trainer.positions import true_positions
from reference_trainer.refinement import refine
from reference_trainer.scenes import Scenes, draw_scenes

MODELS: tuple[SymbolModel, ...] = ("constant", "iid")


def drawn(symbols: SymbolModel, count: int = 12) -> tuple[ScenePhysics, Scenes, Tensor]:
    """Some scenes, and what their sources sent."""
    physics = ScenePhysics(symbols=symbols)
    scenes = draw_scenes(physics, seed=4, split="test", indices=range(count), estimate=False)
    symbols_sent = sent_symbols(physics, scenes, seed=4, split="test", indices=range(count))
    return physics, scenes, symbols_sent


def clean_snapshots(
    physics: ScenePhysics, scenes: Scenes, scene: int, positions: np.ndarray, symbols: np.ndarray
) -> np.ndarray:
    """Snapshots [L * M] of sources at positions [K, 3] that send symbols [S, K], one after another."""
    vectors = steering_vectors(physics, *torch.from_numpy(positions.T.copy())).numpy()
    channel, codes = scenes.channel[scene].numpy(), scenes.codes[scene].numpy()
    rows = []
    for snapshot in range(physics.snapshots):
        sent = symbols[snapshot if len(symbols) > 1 else 0]
        rows.append(channel @ (codes[snapshot] * (sent @ vectors)))
    return np.concatenate(rows)


def full_bound(
    physics: ScenePhysics, scenes: Scenes, scene: int, symbols: np.ndarray
) -> np.ndarray:
    """Bounds [3 K] from the Fisher matrix of positions and all symbols, by finite differences."""
    count = int(scenes.num_sources[scene])
    truth = (scenes.azimuth_rad, scenes.elevation_rad, scenes.range_m)
    places = np.stack([t[scene, :count].double().numpy() for t in truth])
    sent = symbols[:, :count]
    point = np.concatenate([places.ravel(), sent.real.ravel(), sent.imag.ravel()])

    def snapshots(values: np.ndarray) -> np.ndarray:
        parts = np.split(values, [3 * count, 3 * count + sent.size])
        complex_symbols = (parts[1] + 1j * parts[2]).reshape(sent.shape)
        return clean_snapshots(
            physics, scenes, scene, parts[0].reshape(3, count).T, complex_symbols
        )

    step, slopes = 1e-5, []
    for index in range(len(point)):
        up, down = point.copy(), point.copy()
        up[index], down[index] = up[index] + step, down[index] - step
        slopes.append((snapshots(up) - snapshots(down)) / (2 * step))
    jacobian = np.stack(slopes, axis=1)
    fisher = 2 * 10 ** (float(scenes.snr_db[scene]) / 10) * (jacobian.conj().T @ jacobian).real
    scale = 1 / np.sqrt(np.diag(fisher))
    inverse = np.linalg.inv(fisher * scale[:, None] * scale[None, :])
    return (np.sqrt(np.diag(inverse)) * scale)[: 3 * count]


@pytest.mark.parametrize("symbols", MODELS)
def test_the_bound_is_the_inverse_of_the_full_fisher_matrix(symbols: SymbolModel) -> None:
    """Projecting the symbols out gives what inverting the matrix of all unknowns gives."""
    physics, scenes, sent = drawn(symbols)
    bound = cramer_rao_bound(physics, scenes, sent)
    assert set(scenes.num_sources.tolist()) >= {1, 5}
    for scene in range(len(scenes)):
        count = int(scenes.num_sources[scene])
        found = torch.cat(
            [b[scene, :count] for b in (bound.azimuth_rad, bound.elevation_rad, bound.range_m)]
        )
        expected = full_bound(physics, scenes, scene, sent[scene].numpy())
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3)


@pytest.mark.parametrize("symbols", MODELS)
def test_the_sent_symbols_are_those_in_the_snapshots(symbols: SymbolModel) -> None:
    """Taking the clean snapshots away leaves the noise; the clean ones have unit mean power."""
    physics, scenes, sent = drawn(symbols)
    for scene in range(len(scenes)):
        truth = (scenes.azimuth_rad, scenes.elevation_rad, scenes.range_m.clamp_min(1))
        places = np.stack([t[scene].double().numpy() for t in truth], axis=1)
        clean = clean_snapshots(physics, scenes, scene, places, sent[scene].numpy())
        assert np.mean(np.abs(clean) ** 2) == pytest.approx(1, rel=1e-4)
        noise = scenes.snapshots[scene].numpy().ravel() - clean
        power = 10 ** (-float(scenes.snr_db[scene]) / 10)
        assert np.mean(np.abs(noise) ** 2) == pytest.approx(power, rel=0.3)


@pytest.mark.parametrize("symbols", MODELS)
def test_maximum_likelihood_spreads_as_the_bound_says(symbols: SymbolModel) -> None:
    """Over fresh noise on one scene at 25 dB the estimates have the bound's standard deviation."""
    physics, scenes, sent = drawn(symbols)
    chosen = (scenes.num_sources == 2).nonzero()[0]
    trials = 250
    scene = replace(scenes.select(chosen), snr_db=torch.full((1,), 25.0))
    bound = cramer_rao_bound(physics, scene, sent[chosen])
    truth = (scene.azimuth_rad, scene.elevation_rad, scene.range_m.clamp_min(1))
    places = np.stack([t[0].double().numpy() for t in truth], axis=1)
    clean = clean_snapshots(physics, scene, 0, places, sent[chosen][0].numpy())
    noise = torch.randn(
        trials, 16, 16, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)
    )
    many = scene.select(torch.zeros(trials, dtype=torch.int64))
    received = torch.from_numpy(clean).reshape(16, 16) + 10 ** (-25 / 20) * noise
    many = replace(many, snapshots=received.to(torch.complex64))
    found = refine(physics, many, true_positions(many)).positions
    errors = torch.stack(
        (
            found.azimuth_rad - many.azimuth_rad,
            found.elevation_rad - many.elevation_rad,
            found.range_m - many.range_m,
        )
    )[..., :2].double()
    limits = torch.stack((bound.azimuth_rad, bound.elevation_rad, bound.range_m))[:, 0, :2]
    ratio = errors.square().mean(dim=1).sqrt() / limits
    assert bool(((ratio > 0.87) & (ratio < 1.13)).all()), ratio
    assert bool((errors.mean(dim=1).abs() < 0.25 * limits).all())


@pytest.mark.parametrize("symbols", MODELS)
def test_inactive_slots_have_no_bound(symbols: SymbolModel) -> None:
    """The bound is NaN just where there is no source."""
    physics, scenes, sent = drawn(symbols)
    bound = cramer_rao_bound(physics, scenes, sent)
    for values in (bound.azimuth_rad, bound.elevation_rad, bound.range_m):
        assert torch.equal(values.isnan(), ~scenes.active)
        assert bool((values[scenes.active] > 0).all())


def test_ten_times_less_noise_is_ten_times_less_error() -> None:
    """The bound is proportional to the standard deviation of the noise."""
    physics, scenes, sent = drawn("constant")
    before = cramer_rao_bound(physics, scenes, sent).range_m
    quieter = replace(scenes, snr_db=scenes.snr_db + 20)
    after = cramer_rao_bound(physics, quieter, sent).range_m
    torch.testing.assert_close(10 * after, before, rtol=1e-4, atol=0, equal_nan=True)


def test_the_bound_does_not_depend_on_the_neighbours_in_the_batch() -> None:
    """One scene alone has the bound that it has among 40 others."""
    physics, scenes, sent = drawn("iid", count=40)
    together = cramer_rao_bound(physics, scenes, sent).azimuth_rad
    alone = cramer_rao_bound(physics, scenes.select(slice(35, 36)), sent[35:36]).azimuth_rad
    torch.testing.assert_close(alone, together[35:36], rtol=1e-8, atol=0, equal_nan=True)


def test_symbols_of_other_scenes_are_refused() -> None:
    """Another seed would give the bound of scenes that were never drawn."""
    physics, scenes, _ = drawn("constant")
    with pytest.raises(ValueError, match="belong to other scenes"):
        sent_symbols(physics, scenes, seed=5, split="test", indices=range(12))


def test_symbols_of_the_other_model_are_refused() -> None:
    """One symbol for all snapshots is no symbol for each of them."""
    _, scenes, sent = drawn("constant")
    with pytest.raises(ValueError, match="expected \\(12, 16, 5\\)"):
        cramer_rao_bound(ScenePhysics(symbols="iid"), scenes, sent)

"""The fitted covariance: the fixed point of its definition, and far more signal than averaging."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from reference_trainer import sample_covariance
from reference_trainer.covariance import rank_report
from reference_trainer.physics import ScenePhysics, SymbolModel
from reference_trainer.sample_covariance import fitted_factor
from reference_trainer.scenes import Scenes, draw_scenes
from reference_trainer.search_grid import search_grid
from tests.reference_trainer.localisation_oracles import fixed_point_powers, steering

CPU = torch.device("cpu")


def drawn(
    count: int, *, symbols: SymbolModel, snr_db: float | None = None, sources: int = 5
) -> Scenes:
    """Scenes of one symbol model, at one SNR if asked for."""
    physics = ScenePhysics(symbols=symbols, max_sources=sources)
    if snr_db is not None:
        physics = ScenePhysics(
            symbols=symbols, max_sources=sources, min_snr_db=snr_db, max_snr_db=snr_db
        )
    return draw_scenes(physics, seed=3, split="validation", indices=range(count))


def sensing_matrices(scenes: Scenes, scene: int) -> np.ndarray:
    """``Phi_l = H diag(c_l)`` in double precision, ``[L, M, N]``."""
    channel = scenes.channel[scene].numpy().astype(np.complex128)
    return channel[None] * scenes.codes[scene].numpy()[:, None, :]


@pytest.mark.parametrize("symbols", ["iid", "constant"])
def test_the_powers_are_those_of_the_dense_fixed_point(symbols, monkeypatch) -> None:
    """With the neighbours left out, the fit agrees with loops over atoms and dense inverses.

    With constant symbols all 256 received numbers are one measurement of one field.
    """
    monkeypatch.setattr(sample_covariance, "OVERSAMPLING", 0.7)
    monkeypatch.setattr(sample_covariance, "FINE_ROUNDS", 0)
    monkeypatch.setattr(sample_covariance, "_with_neighbours", lambda _physics, _grid, atoms: atoms)
    physics = ScenePhysics(symbols=symbols)
    scenes = drawn(2, symbols=symbols, snr_db=10.0)
    grid = search_grid(physics, oversampling=0.7, device=CPU)
    monkeypatch.setattr(sample_covariance, "COARSE_ATOMS", len(grid))
    monkeypatch.setattr(sample_covariance, "FINE_SEEDS", len(grid))
    factor = fitted_factor(physics, scenes, columns=144).to(torch.complex128)
    atoms = np.stack([steering(physics, a, e, 1 / i) for a, e, i in grid.places.tolist()], axis=1)
    for scene in range(2):
        sensing = sensing_matrices(scenes, scene)
        received = scenes.snapshots[scene].numpy().astype(np.complex128)
        signal = max(float(np.mean(np.abs(received) ** 2)) - 0.1, 1e-3)
        row_power = float(np.mean(np.sum(np.abs(sensing) ** 2, axis=-1)))
        if symbols == "constant":
            sensing, received = sensing.reshape(1, 256, 144), received.reshape(1, 256)
        start = np.full(len(grid), signal * 144 / row_power / len(grid))
        rounds = fixed_point_powers(sensing, received, atoms, start, noise=0.1)
        *_, power = islice(rounds, 1 + sample_covariance.COARSE_ROUNDS)
        expected = (atoms * power) @ atoms.conj().T
        expected *= 144 / np.trace(expected).real
        found = (factor[scene] @ factor[scene].mH).numpy()
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize(("symbols", "most"), [("iid", 0.8), ("constant", 0.4)])
def test_the_fit_points_into_the_true_subspace(symbols, most) -> None:
    """At 20 dB the top subspace is nearly the true one, where that of the plain estimate is not.

    Published medians for three sources: 0.95 for a fit to a fixed grid, 0.18 and 0.32 for averages. The
    estimate of changing symbols knows the powers of beams, and does better.
    """
    scenes = drawn(60, symbols=symbols, snr_db=20.0)
    physics = ScenePhysics(symbols=symbols)
    chosen = scenes.select(scenes.num_sources == 3)
    true = {"num_sources": chosen.num_sources, "true_basis": chosen.true_basis}
    fitted = rank_report(fitted_factor(physics, chosen), **true)
    plain = rank_report(chosen.estimate, **true)
    assert fitted.overlap.median() > 0.9
    assert plain.overlap.median() < most
    assert fitted.energy_in_top.median() > 0.8


@pytest.mark.parametrize("symbols", ["iid", "constant"])
def test_the_covariance_is_near_the_true_one(symbols) -> None:
    """At 20 dB the normalised squared error is a fraction of that of the plain estimate, at least 1."""
    scenes = drawn(24, symbols=symbols, snr_db=20.0)
    physics = ScenePhysics(symbols=symbols)

    def error(factor: torch.Tensor) -> float:
        truth = scenes.true_factor @ scenes.true_factor.mH
        difference = torch.linalg.matrix_norm(factor @ factor.mH - truth)
        return float((difference / torch.linalg.matrix_norm(truth)).square().median())

    fitted, plain = error(fitted_factor(physics, scenes)), error(scenes.estimate)
    assert fitted < 0.3
    assert fitted < 0.5 * plain


def test_a_scene_does_not_depend_on_its_neighbours() -> None:
    """Chunks change nothing but rounding errors."""
    scenes = drawn(9, symbols="iid", snr_db=5.0)
    physics = ScenePhysics(symbols="iid")
    whole = fitted_factor(physics, scenes)
    parts = fitted_factor(physics, scenes, chunk_scenes=2)
    expected, found = whole @ whole.mH, parts @ parts.mH
    difference = torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected)
    assert difference.max() < 0.01


@pytest.mark.parametrize("columns", [1, 7, 16, 150])
def test_the_factor_has_the_columns_asked_for_and_trace_144(columns) -> None:
    """Fewer columns are the strongest ones of more; more than there are directions are 0."""
    scenes = drawn(3, symbols="constant")
    factor = fitted_factor(ScenePhysics(), scenes, columns=columns)
    assert factor.shape == (3, 144, columns)
    assert factor.dtype == torch.complex64
    trace = torch.linalg.vector_norm(factor, dim=(1, 2)).square()
    torch.testing.assert_close(trace, torch.full((3,), 144.0), rtol=1e-4, atol=0)


def test_a_factor_without_columns_is_refused() -> None:
    """No columns are an error that says what was expected."""
    with pytest.raises(ValueError, match="columns is 0; expected at least 1"):
        fitted_factor(ScenePhysics(), drawn(1, symbols="constant"), columns=0)


@pytest.mark.gpu
def test_cuda_fits_what_the_cpu_fits() -> None:
    """The device changes rounding errors only."""
    scenes = drawn(8, symbols="iid", snr_db=10.0)
    physics = ScenePhysics(symbols="iid")
    here, there = fitted_factor(physics, scenes), fitted_factor(physics, scenes.to("cuda")).cpu()
    difference = torch.linalg.matrix_norm(here @ here.mH - there @ there.mH)
    assert (difference / torch.linalg.matrix_norm(here @ here.mH)).max() < 0.05

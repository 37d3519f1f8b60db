"""The sensing matrices against dense products, and the derivatives against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reference_trainer.geometry import steering_vectors
from reference_trainer.physics import ScenePhysics, SymbolModel
from reference_trainer.scenes import Scenes, draw_scenes
from reference_trainer.sensing import (
    noise_power,
    sensed,
    sensing_blocks,
    sensing_matrices,
    steering_derivatives,
)

MODELS: tuple[SymbolModel, ...] = ("constant", "iid")


def scenes_of(symbols: SymbolModel, count: int = 4) -> tuple[ScenePhysics, Scenes]:
    """Draw a few scenes of the default physics."""
    physics = ScenePhysics(symbols=symbols)
    scenes = draw_scenes(physics, seed=3, split="test", indices=range(count), estimate=False)
    return physics, scenes


def random_fields(*shape: int) -> Tensor:
    """Complex noise, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, dtype=torch.complex128, generator=generator)


def some_positions(count: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """Azimuth, elevation and range of random sources in float64."""
    generator = torch.Generator().manual_seed(2)
    unit = torch.rand(3, count, dtype=torch.float64, generator=generator)
    return 2.1 * unit[0] - 1.05, 1.04 * unit[1] - 0.52, 1 + 9 * unit[2]


@pytest.mark.parametrize("symbols", MODELS)
def test_sensed_fields_are_the_dense_product(symbols: SymbolModel) -> None:
    """A field arrives as H times the codes times the field, in the block of its snapshots."""
    physics, scenes = scenes_of(symbols)
    fields = random_fields(4, 3, physics.elements)
    blocks = sensing_blocks(physics, scenes, compress=False, double=True)
    expected = torch.einsum(
        "bmn,bln,bpn->bplm", scenes.channel.to(fields), scenes.codes.to(fields), fields
    )
    received = sensed(blocks, fields)
    torch.testing.assert_close(received.transpose(1, 2).reshape(4, 3, 16, 16), expected)


@pytest.mark.parametrize("symbols", MODELS)
def test_the_true_field_leaves_only_the_noise(symbols: SymbolModel) -> None:
    """The part of the snapshots that no source explains has the stated noise power."""
    physics = ScenePhysics(symbols=symbols, min_snr_db=-5.0)
    scenes = draw_scenes(physics, seed=8, split="test", indices=range(60), estimate=False)
    blocks = sensing_blocks(physics, scenes, compress=False)
    columns = sensed(blocks, scenes.true_basis.mT).to(torch.complex128)
    basis = torch.linalg.svd(columns.mT, full_matrices=False)
    kept = basis.U * (basis.S > 1e-4).unsqueeze(-2)
    rest = blocks.target - (kept @ (kept.mH @ blocks.target.unsqueeze(-1))).squeeze(-1)
    free = blocks.equations - blocks.target.shape[1] * scenes.num_sources
    ratio = torch.linalg.vector_norm(rest, dim=(1, 2)).square() / (free * noise_power(scenes))
    assert float(ratio.mean()) == pytest.approx(1, abs=0.03)
    assert bool((ratio - 1).abs().max() < 0.35)


def test_compressed_equations_have_the_same_residual_but_for_a_constant() -> None:
    """Of 256 equations in 144 unknowns, 144 say all: the residual of any field moves by one number."""
    physics, scenes = scenes_of("constant")
    short = sensing_blocks(physics, scenes, double=True)
    full = sensing_blocks(physics, scenes, compress=False, double=True)
    assert short.matrix.shape == (4, 1, 144, 144)
    fields = 10 * random_fields(4, 5, physics.elements)
    for field in fields.unbind(1):
        residuals = []
        for blocks in (short, full):
            rest = blocks.target - sensed(blocks, field.unsqueeze(1)).squeeze(2)
            left_out = blocks.energy - blocks.target.abs().square().sum(dim=(1, 2))
            residuals.append(left_out + rest.abs().square().sum(dim=(1, 2)))
        torch.testing.assert_close(residuals[0], residuals[1], rtol=1e-8, atol=0)


def test_single_precision_is_that_of_the_scenes() -> None:
    """Unless double is asked for, matrices stay complex64, and agree with the double ones."""
    physics, scenes = scenes_of("iid")
    single = sensing_blocks(physics, scenes)
    double = sensing_blocks(physics, scenes, double=True)
    assert single.matrix.dtype == torch.complex64
    torch.testing.assert_close(
        single.matrix.to(torch.complex128), double.matrix, rtol=1e-6, atol=1e-6
    )
    assert torch.equal(single.matrix, sensing_matrices(scenes))


def test_the_derivatives_are_those_of_autograd() -> None:
    """Analytic slopes in azimuth, elevation and range agree with automatic differentiation."""
    physics, positions = ScenePhysics(), some_positions()
    vectors, slopes = steering_derivatives(physics, *positions)

    def parts(*position: Tensor) -> Tensor:
        return torch.view_as_real(steering_vectors(physics, *position))

    torch.testing.assert_close(torch.view_as_real(vectors), parts(*positions))
    for coordinate in range(3):
        tangents = tuple(
            torch.ones_like(p) if index == coordinate else torch.zeros_like(p)
            for index, p in enumerate(positions)
        )
        _, expected = torch.autograd.functional.jvp(parts, positions, tangents)
        found = torch.view_as_real(slopes[:, coordinate])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_the_range_derivative_survives_single_precision() -> None:
    """Far away the slope in range is a small difference of long paths; float32 keeps 3 digits."""
    physics = ScenePhysics()
    azimuth, elevation, _ = some_positions()
    far = torch.full_like(azimuth, 10.0)
    _, exact = steering_derivatives(physics, azimuth, elevation, far)
    _, single = steering_derivatives(physics, azimuth.float(), elevation.float(), far.float())
    scale = torch.linalg.vector_norm(exact, dim=-1)
    error = torch.linalg.vector_norm(single.to(exact.dtype) - exact, dim=-1) / scale
    assert float(error.max()) < 1e-3


def test_noise_power_follows_the_signal_to_noise_ratio() -> None:
    """20 dB are a factor of a hundred, whatever the precision of the scenes."""
    _, scenes = scenes_of("constant")
    expected = [10 ** (-snr / 10) for snr in scenes.snr_db.tolist()]
    assert noise_power(scenes).tolist() == pytest.approx(expected, rel=1e-12)
    assert math.isclose(float(noise_power(scenes).max()), max(expected), rel_tol=1e-12)


def test_selected_blocks_are_the_blocks_of_selected_scenes() -> None:
    """Choosing scenes before or after building the equations is the same."""
    physics, scenes = scenes_of("constant")
    index = torch.tensor([2, 0])
    chosen = sensing_blocks(physics, scenes).select(index)
    built = sensing_blocks(physics, scenes.select(index))
    torch.testing.assert_close(chosen.matrix, built.matrix)
    torch.testing.assert_close(chosen.target, built.target)
    assert len(chosen) == 2

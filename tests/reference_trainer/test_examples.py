"""Scenes made ready for the network and the loss."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from reference_trainer.estimate import beam_map
from reference_trainer.examples import NetworkInput, make_examples, network_input
from reference_trainer.geometry import STENCIL_CENTRE, steering_vectors
from reference_trainer.physics import ScenePhysics
from reference_trainer.scenes import draw_scenes
from tests.reference_trainer.scene_batches import examples


@pytest.mark.parametrize("symbols", ["constant", "iid"])
def test_inputs_have_their_shapes_and_unit_power(symbols):
    """Real single precision, (re, im) last, and one power for all scenes."""
    observed = examples(8, symbols=symbols).observed
    shapes = {field.name: tuple(getattr(observed, field.name).shape) for field in fields(observed)}
    assert shapes == {
        "snapshots": (8, 16, 16, 2),
        "beam_map": (8, 16, 16, 2),
        "codes": (8, 16, 144, 2),
        "snr_db": (8,),
    }
    power = 2 * observed.snapshots.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(power, torch.ones(8))
    assert all(getattr(observed, name).dtype == torch.float32 for name in shapes)


def test_inputs_are_the_scenes_up_to_scale():
    """Snapshots keep their direction, codes and beam map are those of the scene."""
    batch = examples(8)
    received = torch.view_as_complex(batch.observed.snapshots).flatten(1)
    alike = torch.nn.functional.cosine_similarity(
        torch.view_as_real(received).flatten(1),
        torch.view_as_real(batch.scenes.snapshots).flatten(1),
    )
    torch.testing.assert_close(alike, torch.ones(8))
    assert torch.equal(torch.view_as_complex(batch.observed.codes), batch.scenes.codes)
    assert torch.equal(batch.observed.beam_map, beam_map(batch.scenes.estimate))


def test_the_centre_of_a_stencil_is_the_source():
    """Direction 12 of 25 is the steering vector of the source itself."""
    batch = examples(8)
    scenes, active = batch.scenes, batch.scenes.active
    true = steering_vectors(
        ScenePhysics(),
        scenes.azimuth_rad[active],
        scenes.elevation_rad[active],
        scenes.range_m[active],
    )
    torch.testing.assert_close(batch.stencil[active][:, STENCIL_CENTRE], true)


def test_selecting_examples_selects_all_of_them_alike():
    """An index picks the same scenes in the observations, the truth and the stencil."""
    batch, index = examples(8), torch.tensor([5, 2])
    picked = batch.select(index)
    assert len(picked) == 2
    assert torch.equal(picked.stencil, batch.stencil[index])
    assert torch.equal(picked.scenes.range_m, batch.scenes.range_m[index])
    expected = network_input(batch.scenes.select(index))
    for field in fields(NetworkInput):
        got = getattr(picked.observed, field.name)
        torch.testing.assert_close(got, getattr(expected, field.name))


def test_scenes_without_their_estimate_are_refused():
    """The beam map needs the receiver's estimate; the message says how to draw it."""
    physics = ScenePhysics()
    scenes = draw_scenes(physics, seed=0, split="train", indices=range(2), estimate=False)
    with pytest.raises(ValueError, match="estimate=False"):
        make_examples(physics, scenes)

"""The network has the published shape, and every tensor of it is in use."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from reference_trainer.examples import Examples
from reference_trainer.loss import LossWeights, loss_terms, weighted_sum
from reference_trainer.model import (
    GROUP_SIZES,
    PARAMETER_TENSORS,
    PARAMETERS,
    CovarianceNetwork,
    Prediction,
    parameter_groups,
)
from tests.reference_trainer.scene_batches import examples

PUBLISHED = {
    "snapshots.stem": (36_064, 2),
    "snapshots.depthwise": (896, 2),
    "snapshots.pointwise": (100_800, 2),
    "snapshots.encoder": (5_064_448, 48),
    "beams": (114_912, 2),
    "codes": (322_784, 2),
    "fusion": (401_856, 2),
    "lag_fusion.projection": (64_400, 2),
    "lag_fusion.mix": (251_328, 2),
    "spectrum_fusion.projection": (14_112, 4),
    "spectrum_fusion.mix": (251_328, 2),
    "count_direct": (59_013, 6),
    "count_scale": (1, 1),
    "angle_factor": (646_560, 2),
    "range_factor": (646_560, 2),
    "count_spectral": (3_633, 6),
    "grid_logits": (8_353_645, 2),
    "aux_angles": (4_490, 2),
    "aux_range": (2_245, 2),
}
"""Parameters and tensors of each part of the published model."""


@cache
def network() -> CovarianceNetwork:
    """Return one network for all tests that do not train it."""
    torch.manual_seed(0)
    return CovarianceNetwork()


def loss_of(model: CovarianceNetwork, batch: Examples) -> Tensor:
    """Return the loss of one batch."""
    return weighted_sum(loss_terms(model(batch.observed), batch), LossWeights())


def outputs(prediction: Prediction) -> dict[str, Tensor]:
    """Return what is predicted, by name."""
    return {field.name: getattr(prediction, field.name) for field in fields(Prediction)}


@pytest.mark.parametrize("part", PUBLISHED)
def test_every_part_has_its_published_size(part):
    """Parameters and tensors agree part by part."""
    held = [p for name, p in network().named_parameters() if f"{name}.".startswith(f"{part}.")]
    assert (sum(p.numel() for p in held), len(held)) == PUBLISHED[part]


def test_the_network_has_93_tensors_and_16339075_parameters():
    """The published totals, and nothing but the parts listed above."""
    parameters = list(network().parameters())
    assert len(parameters) == PARAMETER_TENSORS == 93
    assert sum(p.numel() for p in parameters) == PARAMETERS == 16_339_075
    assert sum(tensors for _, tensors in PUBLISHED.values()) == 93


def test_the_groups_have_their_published_sizes():
    """Every parameter is in one group, and the groups count 6,681,942 and 9,657,133."""
    groups = parameter_groups(network())
    assert {name: sum(p.numel() for p in group) for name, group in groups.items()} == GROUP_SIZES
    assert GROUP_SIZES == {"backbone": 6_681_942, "head": 9_657_133}
    together = [id(p) for group in groups.values() for p in group]
    assert sorted(together) == sorted(id(p) for p in network().parameters())


def test_the_state_holds_the_parameters_only():
    """Grids of angles are constants: they are not saved, and they do not change what is."""
    assert len(network().state_dict()) == PARAMETER_TENSORS


def dead_parameters(model: CovarianceNetwork) -> list[str]:
    """Name the tensors without a finite gradient that is somewhere not zero."""
    return [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_tensor_is_live_in_the_first_step(precision):
    """All 93 tensors have a finite gradient that is not zero, in any precision."""
    torch.manual_seed(0)
    # Half precision is slow on a CPU, and even two scenes reach every tensor.
    model, batch = CovarianceNetwork(), examples(8).select(slice(0, 2))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    scale = 2.0**16 if precision == "fp16" else 1.0
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        prediction = model(batch.observed)
    loss = weighted_sum(loss_terms(prediction, batch), LossWeights())
    (scale * loss).backward()
    assert dead_parameters(model) == []


def test_every_tensor_stays_live_in_training():
    """None of the 93 tensors dies in the first steps at the learning rates of the presets."""
    torch.manual_seed(0)
    model, batch = CovarianceNetwork(), examples(8)
    groups = parameter_groups(model)
    optimizer = torch.optim.AdamW(
        [{"params": groups["backbone"], "lr": 1e-3}, {"params": groups["head"], "lr": 4e-3}],
        fused=True,
    )
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        assert dead_parameters(model) == []
        optimizer.step()


def test_every_input_weight_of_the_features_is_live():
    """No column of a layer that reads features multiplies an input that is always zero."""
    model = CovarianceNetwork()
    loss_of(model, examples(16)).backward()
    readers = {
        "beams": model.beams,
        "lags": model.lag_fusion.projection,
        "spectrum": model.spectrum_fusion.projection[0],
        "counts": model.count_spectral[1],
    }
    for name, layer in readers.items():
        assert layer.weight.grad.abs().sum(0).min() > 0, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_says_nearly_the_same(dtype):
    """Under autocast all outputs are finite, in single precision, and close to the plain ones."""
    batch = examples(8)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        cast = outputs(network()(batch.observed))
    with torch.no_grad():
        plain = outputs(network()(batch.observed))
    for name, value in plain.items():
        assert cast[name].dtype == value.dtype
        error = torch.linalg.vector_norm(cast[name] - value)
        assert error < 0.05 * torch.linalg.vector_norm(value), name


def test_a_loss_scale_that_is_too_large_falls_to_the_usual_one():
    """Starting from 2**24 in fp16, steps are skipped until the scale fits, which is above 2**12."""
    torch.manual_seed(0)
    model, batch = CovarianceNetwork(), examples(8).select(slice(0, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-4)
    with torch.autocast("cpu", dtype=torch.float16):
        prediction = model(batch.observed)
    loss = weighted_sum(loss_terms(prediction, batch), LossWeights())
    before = model.fusion.weight.detach().clone()
    for expected_skip in (True, True, False):
        optimizer.zero_grad()
        scaler.scale(loss).backward(retain_graph=True)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.fusion.weight) == expected_skip
    assert scaler.get_scale() == 2.0**16


def test_a_scene_is_predicted_alike_in_any_company():
    """No scene of a batch has a part in the prediction of another."""
    batch = examples(8)
    with torch.no_grad():
        together = outputs(network().eval()(batch.observed))
        alone = outputs(network()(batch.select(slice(2, 3)).observed))
    for name, value in alone.items():
        torch.testing.assert_close(value, together[name][2:3], rtol=1e-3, atol=1e-4)


def test_without_dropout_training_and_evaluation_agree():
    """Train and validation mode compute the same function."""
    batch = examples(4)
    with torch.no_grad():
        train = outputs(network().train()(batch.observed))
        evaluated = outputs(network().eval()(batch.observed))
    for name, value in train.items():
        torch.testing.assert_close(evaluated[name], value, rtol=1e-3, atol=1e-4)


def test_every_input_matters():
    """Changing any of the four inputs changes what is predicted."""
    batch = examples(4)
    with torch.no_grad():
        plain = network()(batch.observed)
        for name in ("snapshots", "beam_map", "codes", "snr_db"):
            changed = replace(batch.observed, **{name: getattr(batch.observed, name) + 0.5})
            assert not torch.equal(network()(changed).k_logits, plain.k_logits), name


def test_a_poisoned_scene_spoils_its_own_prediction_only():
    """NaN in one scene's input gives NaN there, no error, and clean neighbours."""
    batch = examples(4)
    snapshots = batch.observed.snapshots.clone()
    snapshots[1, 0, 0, 0] = math.nan
    with torch.no_grad():
        prediction = network()(replace(batch.observed, snapshots=snapshots))
    assert prediction.k_logits[1].isnan().all()
    assert prediction.k_logits[[0, 2, 3]].isfinite().all()


def test_an_observation_of_another_shape_is_refused():
    """The message names the observation, its shape and the one the network is built for."""
    observed = replace(examples(4).observed, codes=torch.zeros(4, 16, 100, 2))
    with pytest.raises(ValueError, match=r"codes has shape \(4, 16, 100, 2\), expected .*144"):
        network()(observed)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_a_dropout_that_is_no_probability_is_refused(dropout):
    """Dropout is a probability below 1."""
    with pytest.raises(ValueError, match="dropout is"):
        CovarianceNetwork(dropout=dropout)

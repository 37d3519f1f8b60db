"""The loss as a whole: zero at the truth, alive elsewhere, and free of dense matrices."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reference_trainer.factors import scale_to_trace
from reference_trainer.loss import LossTerms, LossWeights, loss_terms, weighted_sum
from reference_trainer.model import CovarianceNetwork, Prediction
from tests.reference_trainer.scene_batches import examples, random_prediction, true_prediction

WEIGHTS = LossWeights()
TERM_NAMES = [field.name for field in fields(LossTerms)]


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.sampled_from(["constant", "iid"]))
def test_the_loss_at_the_truth_is_zero(seed, symbols):
    """A prediction that says just what is true costs nothing in any term."""
    batch = examples(6, seed=seed, symbols=symbols)
    values = loss_terms(true_prediction(batch), batch)
    for name, value in values.as_dict().items():
        assert abs(value.item()) < 2e-6, name
    assert abs(weighted_sum(values, WEIGHTS).item()) < 1e-5


def test_every_term_is_above_zero_for_a_prediction_that_knows_nothing():
    """No term is constant: each one charges a random prediction."""
    batch = examples(32)
    values = loss_terms(random_prediction(batch), batch)
    assert all(value.item() > 1e-3 for value in values.as_dict().values()), values


@pytest.mark.parametrize("name", TERM_NAMES)
def test_every_term_has_a_finite_live_gradient(name):
    """Each term alone pulls on some output of the network, with finite numbers only."""
    batch = examples(32)
    prediction = random_prediction(batch)
    outputs = [getattr(prediction, field.name) for field in fields(Prediction)]
    value = getattr(loss_terms(prediction, batch), name)
    gradients = torch.autograd.grad(value, outputs, allow_unused=True)
    reached = [grad for grad in gradients if grad is not None]
    assert all(torch.isfinite(grad).all() for grad in reached)
    assert sum(grad.abs().sum().item() for grad in reached) > 0


@given(st.integers(0, 2**31))
@settings(max_examples=10)
def test_the_loss_of_a_batch_is_the_mean_of_its_micro_batches(seed):
    """Every term is a mean over scenes, so accumulation and validation are on one scale."""
    batch = examples(8)
    prediction = random_prediction(batch, seed=seed)

    def part(index: slice) -> torch.Tensor:
        some = {field.name: getattr(prediction, field.name)[index] for field in fields(Prediction)}
        values = loss_terms(Prediction(**some), batch.select(index))
        return torch.stack(list(values.as_dict().values()))

    parts = [part(slice(start, start + 2)) for start in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(0), part(slice(0, 8)))


def test_slots_without_a_source_do_not_count():
    """What the network says of a slot that holds no source changes nothing."""
    batch = examples(16)
    prediction = random_prediction(batch)
    empty = ~batch.scenes.active
    assert empty.any()
    names = [field.name for field in fields(Prediction) if field.name.startswith(("aux", "grid"))]
    other = {name: torch.where(empty, 9.0, getattr(prediction, name)) for name in names}
    expected = loss_terms(prediction, batch).as_dict()
    torch.testing.assert_close(loss_terms(replace(prediction, **other), batch).as_dict(), expected)


def test_the_blend_enters_the_covariance_but_not_the_prediction_term():
    """At nearly full blend the covariance term is that of the receiver's own estimate."""
    batch = examples(16)
    truth = true_prediction(batch)
    values = loss_terms(truth, batch, blend=0.999999)
    sample = replace(
        truth,
        angle_factor=_padded(batch.scenes.estimate),
        range_factor=torch.zeros(16, 144, 5) * 1j,
    )
    alone = loss_terms(sample, batch)
    assert values.prediction.item() == pytest.approx(0.0, abs=2e-6)
    assert values.covariance.item() == pytest.approx(alone.covariance.item(), rel=1e-4)
    assert values.covariance.item() > 0.1


def _padded(estimate: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(scale_to_trace(estimate), (0, 5 - estimate.shape[-1]))


class DenseMatrixWatch(TorchDispatchMode):
    """Collects every operation that makes a matrix of elements by elements."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.dense: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.operations += 1
        shapes = [leaf.shape for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        self.dense += [str(func) for shape in shapes if shape[-2:] == (144, 144)]
        return results


def test_the_training_path_builds_no_dense_covariance():
    """No operation of forward, loss and backward returns a matrix of elements by elements."""
    batch = examples(2)
    model = CovarianceNetwork()
    with DenseMatrixWatch() as watch:
        weighted_sum(loss_terms(model(batch.observed), batch, blend=0.3), WEIGHTS).backward()
    assert watch.operations > 500
    assert watch.dense == []


def test_the_loss_is_in_single_precision_under_autocast():
    """Autocast around the loss changes no bit of it."""
    batch = examples(8)
    prediction = random_prediction(batch)
    plain = loss_terms(prediction, batch)
    with torch.autocast("cpu", dtype=torch.float16):
        cast = loss_terms(prediction, batch)
    assert all(
        torch.equal(getattr(plain, name), getattr(cast, name))
        and getattr(cast, name).dtype == torch.float32
        for name in TERM_NAMES
    )


def test_there_is_one_weight_for_every_term():
    """Terms and weights have the same names in the same order."""
    assert [field.name for field in fields(LossWeights)] == TERM_NAMES


@given(st.lists(st.floats(0, 100), min_size=10, max_size=10).filter(any))
def test_the_loss_is_the_weighted_sum_of_its_terms(weights):
    """Each weight multiplies its own term."""
    values = LossTerms(**{name: torch.tensor(1.0 + i) for i, name in enumerate(TERM_NAMES)})
    loss = weighted_sum(values, LossWeights(**dict(zip(TERM_NAMES, weights, strict=True))))
    assert loss.item() == pytest.approx(
        sum(weight * (1 + i) for i, weight in enumerate(weights)), rel=1e-5
    )


def test_a_term_without_weight_takes_no_part():
    """Not even if it is NaN: switching a term off switches it off."""
    values = LossTerms(**dict.fromkeys(TERM_NAMES, torch.tensor(1.0)))
    broken = replace(values, chamfer=torch.tensor(math.nan))
    assert weighted_sum(broken, WEIGHTS).isnan()
    assert weighted_sum(broken, replace(WEIGHTS, chamfer=0.0)).isfinite()


def test_a_loss_of_no_terms_is_refused():
    """All weights zero is a mistake and says so."""
    values = LossTerms(**dict.fromkeys(TERM_NAMES, torch.tensor(1.0)))
    nothing = LossWeights(**dict.fromkeys(TERM_NAMES, 0.0))
    with pytest.raises(ValueError, match="every weight is 0"):
        weighted_sum(values, nothing)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_no_weight_is_refused(weight):
    """The message names the weight and what was expected."""
    with pytest.raises(ValueError, match=r"alignment is .* expected a finite number"):
        LossWeights(alignment=weight)

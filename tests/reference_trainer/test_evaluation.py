"""Evaluation: the training objective, in evaluation mode, on any batch layout."""

from __future__ import annotations

import pytest
import torch

from reference_trainer.evaluation import evaluate
from reference_trainer.loss import LossWeights
from reference_trainer.model import CovarianceNetwork
from reference_trainer.objective import Objective
from tests.reference_trainer.scene_batches import examples

OBJECTIVE = Objective(weights=LossWeights())


@pytest.fixture(scope="module")
def network() -> CovarianceNetwork:
    """Return one initial network with dropout."""
    torch.manual_seed(0)
    return CovarianceNetwork(dropout=0.3)


def test_the_batch_layout_does_not_matter(network: CovarianceNetwork) -> None:
    """Short last batches weigh what they hold: any batch size gives the mean over the scenes."""
    whole = evaluate(network, examples(7), OBJECTIVE, batch_scenes=7)
    parts = evaluate(network, examples(7), OBJECTIVE, batch_scenes=3)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.terms == pytest.approx(whole.terms, rel=1e-4, abs=1e-7)
    assert parts.source_count_accuracy == pytest.approx(whole.source_count_accuracy)


def test_it_is_the_training_loss_without_dropout(network: CovarianceNetwork) -> None:
    """Training and evaluation call one function: in evaluation mode their losses are equal."""
    network.eval()
    direct = OBJECTIVE(network, examples(5)).loss.item()
    assert evaluate(network, examples(5), OBJECTIVE, batch_scenes=5).loss == direct


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_no_trace(network: CovarianceNetwork, training: bool) -> None:
    """Mode, weights, gradients and random state are as before; dropout drew nothing."""
    network.train(training)
    weights = [parameter.clone() for parameter in network.parameters()]
    state = torch.get_rng_state()
    evaluate(network, examples(4), OBJECTIVE, batch_scenes=4)
    assert network.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, weights, network.parameters()))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_mode_comes_back_when_it_fails(network: CovarianceNetwork) -> None:
    """An error in the middle leaves the model in the mode it had."""
    network.train()
    with pytest.raises(ValueError, match="blend"):
        evaluate(
            network,
            examples(2),
            Objective(weights=LossWeights(), sample_blend=2.0),
            batch_scenes=2,
        )
    assert network.training

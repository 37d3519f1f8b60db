"""Model, parameter groups and loss of the case study: right, or wired as published."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from examples.case_study.faults import Fault
from reference_trainer.examples import Examples
from reference_trainer.factors import blended_factor, joint_factor
from reference_trainer.loss import LossTerms, LossWeights, loss_terms, weighted_sum
from reference_trainer.model import HEAD_MODULES, MAX_SOURCES, CovarianceNetwork, Prediction
from reference_trainer.objective import Objective
from reference_trainer.terms import LABEL_SMOOTHING, covariance_error

BLEND = 0.3
HEADS = (*HEAD_MODULES, "count_direct")
BACKBONE_RATE, HEAD_RATE = 1e-3, 4e-3
_WEIGHTS = LossWeights()
_OLD_ALIGNMENT_WEIGHT = 0.002


class NeverCalled(nn.Module):
    """Holds a module and passes its first input on without it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, state: Tensor, _features: Tensor) -> Tensor:
        """Return ``state``."""
        return state


def network(faults: frozenset[Fault]) -> CovarianceNetwork:
    """Return the full model; seeds torch."""
    torch.manual_seed(0)
    model = CovarianceNetwork()
    if Fault.MODULES_NEVER_CALLED in faults:
        model.add_module("spectrum_fusion", NeverCalled(model.spectrum_fusion))
    return model


def optimizer_of(model: nn.Module, faults: frozenset[Fault]) -> torch.optim.AdamW:
    """Return AdamW with one group for the backbone and one for the heads."""
    heads = HEAD_MODULES if Fault.HEAD_IN_WRONG_GROUP in faults else HEADS
    named = list(model.named_parameters())
    head = [p for name, p in named if name.startswith(heads)]
    backbone = [p for name, p in named if not name.startswith(heads)]
    groups = [{"params": backbone, "lr": BACKBONE_RATE}, {"params": head, "lr": HEAD_RATE}]
    return torch.optim.AdamW(groups, weight_decay=0.0)


@dataclass(frozen=True)
class Value:
    """The loss of one batch and its terms."""

    loss: Tensor
    terms: LossTerms


@dataclass(frozen=True)
class Loss:
    """The training loss, with the faults of the published one."""

    faults: frozenset[Fault]
    half: bool = False

    def __call__(self, model: nn.Module, examples: Examples) -> Value:
        """Return the loss of the model on a batch."""
        autocast = torch.float16 if self.half else None
        predicted = Objective(weights=_WEIGHTS, autocast=autocast)(model, examples).prediction
        return self.of(predicted, examples)

    def of(self, predicted: Prediction, examples: Examples, *, blend: float = BLEND) -> Value:
        """Return the loss of a prediction."""
        if Fault.GRID_HEAD_NOT_IN_LOSS in self.faults:
            predicted = replace(
                predicted,
                grid_azimuth_rad=predicted.aux_azimuth_rad,
                grid_elevation_rad=predicted.aux_elevation_rad,
            )
        terms = loss_terms(predicted, examples, blend=blend)
        if Fault.TERMS_CONSTANT_ZERO in self.faults:
            terms = replace(terms, alignment=_swallowed(), contrast=_swallowed())
        if Fault.LOSS_AT_TRUTH in self.faults:
            terms = replace(terms, covariance=_loaded_on_one_side(predicted, examples, blend))
        loss = weighted_sum(terms, _WEIGHTS)
        if Fault.NAN_ZEROED in self.faults:
            loss = loss + _OLD_ALIGNMENT_WEIGHT * old_alignment(predicted, examples)
        return Value(loss, terms)

    def validation(self, model: nn.Module, examples: Examples) -> Value:
        """Return what is called the validation loss."""
        predicted = Objective(weights=_WEIGHTS)(model, examples).prediction
        if Fault.VALIDATION_DIFFERS not in self.faults:
            return self.of(predicted, examples)
        orthonormal = torch.linalg.qr(predicted.angle_factor).Q
        other = replace(
            predicted, angle_factor=orthonormal, range_factor=3**0.5 * predicted.range_factor
        )
        return self.of(other, examples, blend=0.0)


def _swallowed() -> Tensor:
    """Return what ``except Exception: return 0`` leaves of a term."""
    try:
        return torch.ones(15)[0, 0]
    except IndexError:
        return torch.zeros(())


def _loaded_on_one_side(predicted: Prediction, examples: Examples, blend: float) -> Tensor:
    """Return the covariance error of (R + I) / 2 against the truth: a constant meant for elsewhere."""
    factor = joint_factor(predicted.angle_factor, predicted.range_factor)
    blended = blended_factor(factor, examples.scenes.estimate, blend)
    identity = torch.eye(blended.shape[-2], dtype=blended.dtype).expand(len(blended), -1, -1)
    loaded = torch.cat([blended, identity], dim=-1) / 2**0.5
    scenes = examples.scenes
    return covariance_error(loaded, scenes.true_factor, scenes.snr_db).mean()


def old_alignment(predicted: Prediction, examples: Examples) -> Tensor:
    """Return the power of the true directions outside of the signal subspace, by singular vectors.

    Of 144 singular values 134 are equal (zero): the derivative divides by their differences.
    """
    factor = joint_factor(predicted.angle_factor, predicted.range_factor)
    vectors = torch.linalg.svd(factor @ factor.mH).U[..., :MAX_SOURCES]
    basis = examples.scenes.true_basis
    outside = basis - vectors @ (vectors.mH @ basis)
    return torch.view_as_real(outside).square().sum(dim=(-3, -2, -1)).mean()


def truth(examples: Examples) -> Prediction:
    """Return the prediction that says just what is true."""
    scenes = examples.scenes
    classes = scenes.true_factor.shape[-1]
    right = nn.functional.one_hot(scenes.num_sources - 1, classes).float()
    smoothed = (1.0 - LABEL_SMOOTHING) * right + LABEL_SMOOTHING / classes
    return Prediction(
        angle_factor=scenes.true_factor,
        range_factor=scenes.true_factor,
        aux_azimuth_rad=scenes.azimuth_rad,
        aux_elevation_rad=scenes.elevation_rad,
        aux_range_m=scenes.range_m,
        grid_azimuth_rad=scenes.azimuth_rad,
        grid_elevation_rad=scenes.elevation_rad,
        k_logits=smoothed.log(),
    )

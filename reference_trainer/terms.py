"""The terms of the loss as pure functions: one value per scene, [B], and zero at the truth.

Covariances are given by factors of trace N (see ``factors.py``): no 144x144 matrix is built. No
eigenvector is differentiated: those of a covariance of low rank have no finite derivative, while
eigenvalues, projections on the true subspace and powers in given directions all do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_trainer.factors import gram, load_weight, spectrum, squared_norm

LABEL_SMOOTHING = 0.05
EIGENGAP_MARGIN = 0.03
CONTRAST_TEMPERATURE = 0.1
ANGLE_THRESHOLD_RAD = math.radians(0.25)
LOG_RANGE_THRESHOLD = 0.2

_SMALLEST = 1e-12


def covariance_error(factor: Tensor, true_factor: Tensor, snr_db: Tensor) -> Tensor:
    """Return ||E - E_true||^2 / ||E_true||^2 of the loaded covariances E = (1 - w) R + w I.

    Args:
        factor: [B, N, n] complex, trace N.
        true_factor: [B, N, k] complex, trace N.
        snr_db: [B]; sets the load w, see :func:`reference_trainer.factors.load_weight`.

    Source: ||Z Z^H - T T^H||^2 = ||Z^H Z||^2 + ||T^H T||^2 - 2 ||Z^H T||^2. The load cancels in the
    difference up to (1 - w), and adds 2 w (1 - w) N + w^2 N to the square of the truth.
    """
    true_square = squared_norm(gram(true_factor, true_factor))
    distance = (
        squared_norm(gram(factor, factor))
        + true_square
        - 2.0 * squared_norm(gram(factor, true_factor))
    )
    load, elements = load_weight(snr_db), factor.shape[-2]
    kept = 1.0 - load
    loaded_square = kept.square() * true_square + (2.0 * kept + load) * load * elements
    return kept.square() * distance / loaded_square


def source_count_divergence(k_logits: Tensor, num_sources: Tensor) -> Tensor:
    """Return the divergence of the predicted distribution of K from the smoothed truth.

    It is the cross entropy less the entropy of the target, so a perfect prediction costs 0. The
    target puts 0.05 of its mass evenly on all classes.

    Args:
        k_logits: [B, classes], logits of 1, 2, ... sources.
        num_sources: [B] int64, from 1.
    """
    classes = k_logits.shape[-1]
    true_class = F.one_hot(num_sources - 1, classes).to(k_logits.dtype)
    target = (1.0 - LABEL_SMOOTHING) * true_class + LABEL_SMOOTHING / classes
    return F.kl_div(k_logits.log_softmax(-1), target, reduction="none").sum(-1)


def eigengap_hinge(factor: Tensor, true_factor: Tensor, num_sources: Tensor) -> Tensor:
    """Return how far the eigenvalue gap after the last source falls short, as a share of the trace.

    Short of 0.03, or of the true gap where that is smaller: weak sources have small true gaps.
    """
    wanted = eigengap(true_factor, num_sources).clamp_max(EIGENGAP_MARGIN)
    return (wanted - eigengap(factor, num_sources)).clamp_min(0.0)


def eigengap(factor: Tensor, num_sources: Tensor) -> Tensor:
    """Return (l_K - l_{K+1}) / trace of F F^H with K = ``num_sources``, [B]."""
    eigenvalues = F.pad(spectrum(factor), (0, 1))  # a factor of K columns has l_{K+1} = 0
    share = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    pair = torch.stack([num_sources - 1, num_sources], dim=-1)
    last, following = share.gather(-1, pair).unbind(-1)
    return last - following


def misaligned_share(factor: Tensor, true_basis: Tensor) -> Tensor:
    """Return the share of the power of F F^H outside the span of the true steering vectors.

    Args:
        factor: [B, N, n] complex.
        true_basis: [B, N, k] complex, orthonormal or zero columns.
    """
    inside = squared_norm(gram(true_basis, factor))
    return 1.0 - inside / squared_norm(factor).clamp_min(_SMALLEST)


def contrast_divergence(
    factor: Tensor, true_factor: Tensor, stencil: Tensor, active: Tensor
) -> Tensor:
    """Return how differently power is spread around each source, a mean over sources.

    Around each source, a^H R a over the directions of its stencil, divided by its largest value,
    gives a softmax of temperature 0.1. The term is the divergence of the predicted distribution
    from the true one. The largest value is a constant to the gradient.

    Args:
        factor: [B, N, n] complex.
        true_factor: [B, N, k] complex.
        stencil: [B, sources, directions, N] complex steering vectors.
        active: [B, sources] bool.
    """
    predicted = _stencil_log_shares(factor, stencil)
    true = _stencil_log_shares(true_factor, stencil)
    divergence = F.kl_div(predicted, true, reduction="none", log_target=True).sum(-1)
    return mean_over_sources(divergence, active)


def _stencil_log_shares(factor: Tensor, stencil: Tensor) -> Tensor:
    """Log of the softmax over each source's stencil, [B, sources, directions]."""
    response = gram(factor, stencil.flatten(1, 2).mT)
    power = torch.view_as_real(response).square().sum(dim=(-3, -1))
    power = power.reshape(stencil.shape[:3])
    largest = power.detach().amax(-1, keepdim=True).clamp_min(_SMALLEST)
    return (power / largest / CONTRAST_TEMPERATURE).log_softmax(-1)


def cross_gram_error(angle_factor: Tensor, range_factor: Tensor) -> Tensor:
    """Return the mean over pairs of columns of |G_a - G_r|^2, G the correlations of the columns.

    The diagonals cancel: a column's correlation with itself is 1.

    Args:
        angle_factor: [B, N, k] complex.
        range_factor: [B, N, k] complex.
    """
    difference = _column_correlations(angle_factor) - _column_correlations(range_factor)
    columns = difference.shape[-1]
    return squared_norm(difference) / (columns * (columns - 1))


def _column_correlations(factor: Tensor) -> Tensor:
    squares = torch.view_as_real(factor).square().sum(dim=(-3, -1)).clamp_min(_SMALLEST)
    columns = factor * squares.rsqrt()[..., None, :]
    return gram(columns, columns)


def aux_angle_error(
    azimuth_rad: Tensor,
    elevation_rad: Tensor,
    true_azimuth_rad: Tensor,
    true_elevation_rad: Tensor,
    active: Tensor,
) -> Tensor:
    """Return the mean over sources of h(azimuth error) + 1.5 h(elevation error); all [B, sources].

    h is Huber's function over its threshold of 0.25 deg: |e| less half the threshold, rounded off
    at 0.
    """
    azimuth = _rounded_abs(azimuth_rad, true_azimuth_rad, ANGLE_THRESHOLD_RAD)
    elevation = _rounded_abs(elevation_rad, true_elevation_rad, ANGLE_THRESHOLD_RAD)
    return mean_over_sources(azimuth + 1.5 * elevation, active)


def aux_range_error(range_m: Tensor, true_range_m: Tensor, active: Tensor) -> Tensor:
    """Return the mean over sources of h(error of the log distance), threshold 0.2; all [B, sources].

    Inactive slots may hold any distance, 0 included.
    """
    one = torch.ones_like(range_m)
    log_range = torch.where(active, range_m, one).clamp_min(_SMALLEST).log()
    true_log_range = torch.where(active, true_range_m, one).log()
    return mean_over_sources(_rounded_abs(log_range, true_log_range, LOG_RANGE_THRESHOLD), active)


def _rounded_abs(value: Tensor, target: Tensor, threshold: float) -> Tensor:
    return F.smooth_l1_loss(value, target, reduction="none", beta=threshold)


def chamfer_error(
    azimuth_rad: Tensor,
    elevation_rad: Tensor,
    true_azimuth_rad: Tensor,
    true_elevation_rad: Tensor,
    active: Tensor,
) -> Tensor:
    """Return the Chamfer distance, rad^2, between the predicted and the true directions.

    From each true direction to the nearest predicted one and back, means over sources; only active
    slots [B, sources] count on either side. The order within a scene is immaterial.
    """
    directions = torch.stack([azimuth_rad, elevation_rad], dim=-1)
    true_directions = torch.stack([true_azimuth_rad, true_elevation_rad], dim=-1)
    apart = (directions[:, :, None] - true_directions[:, None]).square().sum(-1)
    both_active = active[:, :, None] & active[:, None]
    apart = apart.masked_fill(~both_active, torch.inf)
    to_true = torch.where(active, apart.amin(dim=2), 0.0)
    to_predicted = torch.where(active, apart.amin(dim=1), 0.0)
    return mean_over_sources(to_true + to_predicted, active)


def mean_over_sources(values: Tensor, active: Tensor) -> Tensor:
    """Return the mean of ``values`` [B, sources] over each scene's active slots, [B]."""
    kept = torch.where(active, values, 0.0)
    return kept.sum(-1) / active.sum(-1).clamp_min(1)

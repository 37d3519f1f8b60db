"""The number of sources from eigenvalues: the textbook formula, and counts it gets right."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.order import count_sources, loaded_eigenvalues, order_criterion
from tests.reference_trainer.scene_batches import complex_noise

spectra = st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=9).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def sample_eigenvalues(powers: list[float], *, snapshots: int, scenes: int = 200) -> torch.Tensor:
    """Eigenvalues of sample covariances of 8 sensors: sources of these powers in noise of power 1."""
    count = len(powers)
    directions = torch.linalg.qr(complex_noise(scenes, 8, 8, seed=1)).Q[..., :count]
    gains = torch.tensor(powers, dtype=torch.float64).sqrt()[:, None]
    symbols = complex_noise(scenes, count, snapshots, seed=2)
    received = directions @ (gains * symbols) + complex_noise(scenes, 8, snapshots, seed=3)
    return torch.linalg.eigvalsh(received @ received.mH / snapshots).flip(-1)


@given(spectra, st.integers(2, 500), st.sampled_from(["mdl", "aic"]))
def test_the_criterion_is_the_textbook_formula(eigenvalues, snapshots, criterion):
    """Log-likelihood of the tail by the ratio of its means, and a price for every parameter."""
    found = order_criterion(eigenvalues, snapshots=snapshots, max_sources=3, criterion=criterion)
    size = len(eigenvalues)
    for count in range(4):
        tail = eigenvalues[count:].tolist()
        geometric = math.exp(sum(math.log(value) for value in tail) / len(tail))
        likelihood = snapshots * len(tail) * math.log(sum(tail) / len(tail) / geometric)
        price = math.log(snapshots) / 2 if criterion == "mdl" else 1.0
        expected = likelihood + price * count * (2 * size - count)
        assert found[count].item() == pytest.approx(expected, rel=1e-9, abs=1e-7)


@given(spectra, st.floats(1e-6, 1e6))
def test_the_scale_of_the_eigenvalues_does_not_count(eigenvalues, scale):
    """Only ratios of eigenvalues tell sources from noise."""
    one = order_criterion(eigenvalues, snapshots=50, max_sources=3)
    other = order_criterion(scale * eigenvalues, snapshots=50, max_sources=3)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("powers", [[], [3.0], [10.0, 3.0], [30.0, 10.0, 3.0]])
def test_sources_in_white_noise_are_counted(powers):
    """With many snapshots MDL counts right nearly always, and AIC never too low."""
    eigenvalues = sample_eigenvalues(powers, snapshots=400)
    options = {"snapshots": 400, "max_sources": 5, "fewest": 0}
    mdl = count_sources(eigenvalues, **options)
    aic = count_sources(eigenvalues, criterion="aic", **options)
    assert (mdl == len(powers)).double().mean() > 0.97
    assert (aic >= len(powers)).all()
    assert (aic >= mdl).all()


def test_the_count_stays_within_its_limits():
    """Noise alone is the fewest allowed, and far too many sources are the most allowed."""
    noise = sample_eigenvalues([], snapshots=400)
    many = sample_eigenvalues([50.0] * 6, snapshots=400)
    assert set(count_sources(noise, snapshots=400, max_sources=5).tolist()) == {1}
    assert set(count_sources(many, snapshots=400, max_sources=5).tolist()) == {5}


@given(st.integers(0, 10**6), st.integers(1, 12))
def test_loaded_eigenvalues_are_those_of_the_loaded_covariance(seed, columns):
    """All N eigenvalues of R / trace(R) + load I, from a factor of any number of columns."""
    factor = complex_noise(2, 7, columns, seed=seed)
    covariance = factor @ factor.mH
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1).real
    loaded = covariance / trace[:, None, None] + 0.01 * torch.eye(7)
    expected = torch.linalg.eigvalsh(loaded).flip(-1)
    torch.testing.assert_close(loaded_eigenvalues(factor, load=0.01), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "bic"}, "criterion is 'bic'"),
        ({"max_sources": 4}, "at most 4 among 4 eigenvalues"),
        ({"snapshots": 0}, "snapshots is 0"),
        ({"fewest": 4}, "fewest is 4; expected 0 to 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    """Every error names the option and what was expected."""
    with pytest.raises(ValueError, match=message):
        count_sources(torch.ones(2, 4), **{"snapshots": 16, "max_sources": 3, **options})
    with pytest.raises(ValueError, match="load is 0"):
        loaded_eigenvalues(torch.ones(1, 4, 2, dtype=torch.complex64), load=0)

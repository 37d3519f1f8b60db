"""Matching and metrics: the best assignment by brute force, and nothing that is ever dropped."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.matching import RANGE_WEIGHT_M, source_errors
from reference_trainer.metrics import by_count, by_snr, count_summary, summarise
from reference_trainer.positions import Positions

places = st.tuples(st.floats(-1.0, 1.0), st.floats(-0.5, 0.5), st.floats(1.0, 10.0))
scenes_of_places = st.lists(
    st.tuples(st.lists(places, max_size=4), st.lists(places, max_size=4)), min_size=1, max_size=5
)


def positions(scenes: list[list[tuple[float, float, float]]], *, slots: int = 5) -> Positions:
    """Positions of lists of (azimuth rad, elevation rad, range m), in slots chosen at random."""
    generator = torch.Generator().manual_seed(len(scenes))
    values = torch.zeros(len(scenes), slots, 3, dtype=torch.float64)
    active = torch.zeros(len(scenes), slots, dtype=torch.bool)
    for scene, sources in enumerate(scenes):
        slot = torch.randperm(slots, generator=generator)[: len(sources)]
        values[scene, slot] = torch.tensor(sources, dtype=torch.float64).reshape(-1, 3)
        active[scene, slot] = True
    azimuth, elevation, range_m = values.unbind(-1)
    return Positions(azimuth_rad=azimuth, elevation_rad=elevation, range_m=range_m, active=active)


def distance(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """Angle between two directions by the haversine formula, and the weighted inverse range."""
    first, second = one[1], other[1]
    square = (
        math.sin((second - first) / 2) ** 2
        + math.cos(first) * math.cos(second) * math.sin((other[0] - one[0]) / 2) ** 2
    )
    return 2 * math.asin(math.sqrt(square)) + RANGE_WEIGHT_M * abs(1 / one[2] - 1 / other[2])


def smallest_sum(guesses: list, truths: list) -> float:
    """Smallest sum of distances over all one-to-one matchings, by trying every one."""
    few, many = sorted((guesses, truths), key=len)
    return min(
        sum(distance(one, other) for one, other in zip(few, chosen, strict=True))
        for chosen in itertools.permutations(many, len(few))
    )


@given(scenes_of_places)
def test_the_matching_is_the_best_of_all(scenes):
    """No other matching has a smaller sum of distances, and each estimate is used at most once."""
    guesses, truths = [one for one, _ in scenes], [other for _, other in scenes]
    estimated, true = positions(guesses), positions(truths)
    errors = source_errors(estimated, true)
    truth = torch.stack((true.azimuth_rad, true.elevation_rad, true.range_m), -1)[
        true.active
    ].numpy()
    found = truth + np.stack((errors.azimuth_rad, errors.elevation_rad, errors.range_m), -1)
    for scene, (guess, source) in enumerate(scenes):
        rows = (errors.scene == scene) & errors.matched
        total = sum(
            distance(tuple(a), tuple(b)) for a, b in zip(found[rows], truth[rows], strict=True)
        )
        assert rows.sum() == min(len(guess), len(source))
        assert total == pytest.approx(smallest_sum(guess, source), abs=1e-9)


@given(scenes_of_places)
def test_every_source_and_every_estimate_is_counted(scenes):
    """Matched and missed are all true sources; matched and false are all estimates."""
    guesses, truths = [one for one, _ in scenes], [other for _, other in scenes]
    summary = summarise(source_errors(positions(guesses), positions(truths)))
    assert summary.scenes == len(scenes)
    assert summary.matched + summary.missed == summary.true_sources == sum(map(len, truths))
    assert summary.matched + summary.false == sum(map(len, guesses))


@given(scenes_of_places)
def test_the_truth_has_no_error(scenes):
    """The truth itself, in other slots, is within every distance of itself."""
    truths = [other for _, other in scenes]
    estimated = positions(truths, slots=7)
    summary = summarise(source_errors(estimated, positions(truths)))
    assert summary.missed == summary.false == 0
    if summary.true_sources:
        assert summary.azimuth_deg.rmse == summary.range_m.rmse == 0.0
        assert summary.within_1_deg == summary.within_5_deg == 1.0
    else:
        assert summary.within_1_deg is None
        assert summary.azimuth_deg.median is None


def test_a_missed_source_counts_against_the_shares_and_not_the_medians():
    """Two of four sources found, within 0.5 and 3 degrees; one estimate too many elsewhere."""
    degree = math.pi / 180
    truths = [[(0.0, 0.0, 2.0), (0.5, 0.0, 2.0), (-0.5, 0.2, 3.0)], [(0.1, 0.1, 4.0)], []]
    guesses = [[(0.5 * degree, 0.0, 2.5)], [(0.1, 0.1 - 3 * degree, 3.8)], [(0.0, 0.0, 1.0)]]
    summary = summarise(source_errors(positions(guesses), positions(truths)))
    assert (summary.matched, summary.missed, summary.false) == (2, 2, 1)
    assert summary.within_1_deg == summary.within_2_deg == 0.25
    assert summary.within_5_deg == 0.5
    assert summary.azimuth_deg.median == pytest.approx(0.25)
    assert summary.elevation_deg.rmse == pytest.approx(3 / math.sqrt(2))
    assert summary.range_m.median == pytest.approx(0.35)


def test_errors_stand_beside_their_bounds():
    """The median of error over bound, source by source; without a bound it is not measured."""
    truths = [[(0.0, 0.0, 2.0), (0.5, 0.0, 2.0)], [(0.1, 0.1, 4.0)]]
    true = positions(truths)
    estimated = Positions(
        azimuth_rad=true.azimuth_rad + 0.01,
        elevation_rad=true.elevation_rad - 0.02,
        range_m=true.range_m + 0.3,
        active=true.active,
    )
    bound = torch.full((*true.active.shape, 3), math.nan, dtype=torch.float64)
    bound[true.active] = torch.tensor(
        [[0.01, 0.01, 0.1], [0.02, 0.01, 0.3], [0.1, 0.01, 0.6]]
    ).double()
    summary = summarise(source_errors(estimated, true, bound=bound))
    assert summary.azimuth_deg.median_over_bound == pytest.approx(0.5)
    assert summary.azimuth_deg.median_bound == pytest.approx(math.degrees(0.02))
    assert summary.elevation_deg.median_over_bound == pytest.approx(2.0)
    assert summary.range_m.median_over_bound == pytest.approx(1.0)
    assert summarise(source_errors(estimated, true)).range_m.median_over_bound is None


def normal_errors(count: int, sigma: float) -> tuple[Positions, Positions, torch.Tensor]:
    """Estimates with Gaussian errors, the truth and the standard deviations."""
    generator = torch.Generator().manual_seed(0)
    noise = sigma * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    truth = positions([[(0.1, 0.2, 5.0)]] * count, slots=1)
    estimated = Positions(
        azimuth_rad=truth.azimuth_rad + noise[:, :1],
        elevation_rad=truth.elevation_rad + noise[:, 1:2],
        range_m=truth.range_m + noise[:, 2:],
        active=truth.active,
    )
    return estimated, truth, torch.full((count, 1, 3), sigma, dtype=torch.float64)


def test_an_efficient_estimator_has_a_ratio_of_two_thirds():
    """Gaussian errors of just the bound have the median 0.67 of it, and the bound as their RMSE."""
    estimated, true, bound = normal_errors(4000, 0.01)
    summary = summarise(source_errors(estimated, true, bound=bound))
    assert summary.azimuth_deg.median_over_bound == pytest.approx(0.674, abs=0.03)
    assert summary.azimuth_deg.rmse == pytest.approx(math.degrees(0.01), rel=0.03)


@given(scenes_of_places, st.randoms(use_true_random=False))
def test_bins_share_out_all_scenes(scenes, random):
    """Every scene is in one SNR bin and under one count: sums over them are the whole."""
    guesses, truths = [one for one, _ in scenes], [other for _, other in scenes]
    errors = source_errors(positions(guesses), positions(truths))
    snr_db = torch.tensor([random.choice([-5.0, 0.0, 3.3, 10.0, 20.0]) for _ in scenes])
    whole = summarise(errors)
    bins = [part.summary for part in by_snr(errors, snr_db, edges_db=(-5, 0, 10, 20))]
    for parts in (bins, list(by_count(errors).values())):
        for name in ("scenes", "true_sources", "matched", "missed", "false"):
            assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
    for count, part in by_count(errors).items():
        assert part.true_sources == count * part.scenes


def test_an_snr_on_an_edge_belongs_to_the_upper_bin():
    """Bins include their lower edge, and the last its upper one; a scene outside is an error."""
    errors = source_errors(positions([[]] * 4), positions([[(0.0, 0.0, 1.0)]] * 4))
    bins = by_snr(errors, torch.tensor([-5.0, 0.0, 10.0, 20.0]), edges_db=(-5, 0, 20))
    assert [(part.low_db, part.high_db, part.summary.scenes) for part in bins] == [
        (-5.0, 0.0, 1),
        (0.0, 20.0, 3),
    ]
    with pytest.raises(ValueError, match="1 scenes lie outside -5 to 10 dB"):
        by_snr(errors, torch.tensor([-5.0, 0.0, 10.0, 20.0]), edges_db=(-5, 10))
    with pytest.raises(ValueError, match="expected rising numbers"):
        by_snr(errors, torch.zeros(4), edges_db=(5, 5))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_the_confusion_holds_every_scene(pairs):
    """Rows are true counts, columns estimated ones; the diagonal is the accuracy."""
    estimated, true = torch.tensor(pairs).T
    summary = count_summary(estimated, true, max_sources=5)
    for guess, truth in itertools.product(range(6), repeat=2):
        assert summary.confusion[truth][guess] == pairs.count((guess, truth))
    assert summary.accuracy == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert summary.accuracy + summary.under + summary.over == pytest.approx(1.0)


def test_summaries_can_be_written_as_json():
    """What was not measured is null, never NaN, so that any reader takes the file."""
    errors = source_errors(positions([[], []]), positions([[], [(0.0, 0.0, 1.0)]]))
    summary = summarise(errors)
    assert json.loads(json.dumps(asdict(summary), allow_nan=False))["within_5_deg"] == 0.0
    assert summary.azimuth_deg.median is None


def test_what_cannot_be_compared_is_refused():
    """Other scenes, a bound of another shape, NaN and counts out of range are errors."""
    one, two = positions([[(0.0, 0.0, 1.0)]]), positions([[], []])
    with pytest.raises(ValueError, match="estimates of 2 scenes and the truth of 1"):
        source_errors(two, one)
    with pytest.raises(ValueError, match=r"bound of shape \(1, 5\); expected \(1, 5, 3\)"):
        source_errors(one, one, bound=torch.ones(1, 5))
    for place in ((math.nan, 0.0, 1.0), (0.0, 0.0, 0.0)):
        with pytest.raises(ValueError, match="1 scenes have an estimate that is not finite"):
            source_errors(positions([[place]]), one)
    with pytest.raises(ValueError, match="from 1 to 6; expected 0 to 5"):
        count_summary(torch.tensor([6]), torch.tensor([1]), max_sources=5)
    with pytest.raises(ValueError, match="expected \\[B\\] twice"):
        count_summary(torch.tensor([1, 2]), torch.tensor([1]), max_sources=5)

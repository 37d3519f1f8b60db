"""Policies, their decision table and the ceilings, against slow independent computations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from gradguard.decision_table import DecisionTable
from gradguard.gate import StepGate
from gradguard.policies import (
    AnySignal,
    Finite,
    LossSpike,
    NormSpike,
    Policy,
    Row,
    running_estimate,
)
from gradguard.readings import Readings
from gradguard.verdicts import GateCeilingError

ORDERS = (
    (Finite(), AnySignal(), NormSpike(), LossSpike()),
    (LossSpike(), NormSpike(), AnySignal(), Finite()),
    (AnySignal(threshold=1e-6), NormSpike(k=2.0)),
)

mostly, rarely = st.sampled_from([1.0, 1.0, 1.0, 0.0]), st.sampled_from([0.0, 0.0, 0.0, 1.0])
values = st.sampled_from([0.0, 1e-13, 1e-7, 1.0, 2.5, 7.0, -3.0, math.nan, math.inf, -math.inf])


@st.composite
def readings(draw):
    """Draw any readings, whether or not a training step could produce them."""
    return Readings(
        had_gradient=draw(mostly),
        scaler_skips=draw(rarely),
        nonfinite_tensors=draw(st.sampled_from([0.0, 1.0, 5.0])),
        first_nonfinite=0.0,
        norm=abs(draw(values)),
        has_loss=draw(mostly),
        loss=draw(values),
    )


def vetoing_policies(policies, r, estimate):
    """Return the policies that object, bad numbers first, computed with plain floats and ifs."""
    mean, deviation = estimate
    bad, high = [], []
    for policy in policies:
        if isinstance(policy, Finite) and r.nonfinite_tensors > 0:
            bad.append(policy)
        if isinstance(policy, AnySignal) and r.norm <= policy.threshold:
            high.append(policy)
        if isinstance(policy, NormSpike | LossSpike):
            value = r.norm if isinstance(policy, NormSpike) else r.loss
            if isinstance(policy, LossSpike) and not r.has_loss:
                continue
            if not math.isfinite(value):
                bad.append(policy)
            elif value > mean + policy.k * max(deviation, policy.floor * abs(mean)):
                high.append(policy)
    return bad + high


@example(Readings(1.0, 0.0, 2.0, 0.0, math.nan, 1.0, 7.0), ORDERS[1])  # a spike, and worse: NaN
@given(readings(), st.sampled_from(ORDERS))
def test_the_table_agrees_with_plain_ifs(r, policies):
    """For any readings the first row that holds gives the verdict a slow reading of the rules gives."""
    table = DecisionTable(policies)
    like = torch.zeros((), dtype=torch.float64)
    mean, deviation = 1.0, 0.25
    states = [
        torch.tensor([50.0, mean, deviation**2], dtype=torch.float64) if policy.start() else state
        for policy, state in zip(policies, table.start(like), strict=True)
    ]
    judgement = table.judge(Readings(*map(like.new_tensor, r)), states)
    verdict = table.verdict(judgement.packed.tolist())
    left_alone = not r.had_gradient or bool(r.scaler_skips)
    objecting = [] if left_alone else vetoing_policies(policies, r, (mean, deviation))
    assert verdict.decision.allowed is (not objecting)
    assert verdict.decision.policy == (objecting[0].name if objecting else None)
    assert bool(judgement.vetoed) is bool(objecting)
    assert bool(judgement.allowed) is (not objecting and not left_alone)
    assert verdict.judged is not left_alone


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.integers(2, 20))
def test_the_running_estimate_is_a_weighted_mean_and_variance(seen, window):
    """It equals the mean and variance under the weights it promises, computed from all values."""
    state, weights = torch.zeros(3, dtype=torch.float64), []
    for number, value in enumerate(seen, start=1):
        state = running_estimate(state, torch.tensor(value, dtype=torch.float64), window=window)
        newest = max(1 / number, 1 / window)
        weights = [w * (1 - newest) for w in weights] + [newest]
    mean = math.fsum(w * v for w, v in zip(weights, seen, strict=True))
    variance = math.fsum(w * (v - mean) ** 2 for w, v in zip(weights, seen, strict=True))
    assert state.tolist() == pytest.approx([len(seen), mean, variance], rel=1e-9, abs=1e-6)


@given(st.sampled_from([math.nan, math.inf, -math.inf, 3e38]))
def test_what_is_not_finite_is_not_learned(value):
    """NaN, Inf and numbers whose square overflows leave the estimate as it was."""
    state = torch.tensor([5.0, 1.0, 0.5])
    assert torch.equal(running_estimate(state, torch.tensor(value), window=10), state)


def norms_gate(*policies, **options):
    """Return a gate on one weight, and a function that steps with a given norm and loss."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    gate = StepGate(optimizer, policies, **options)

    def step(norm, loss=None):
        weight.grad = torch.full((1,), norm)
        if loss is not None:
            gate.observe(loss=loss)
        optimizer.step()
        return gate.last_decision

    return gate, step


def test_a_spike_is_vetoed_and_not_learned():
    """A norm far above its running mean is vetoed with both numbers in the reason, again and again."""
    _, step = norms_gate(NormSpike(k=6, window=50, warmup=10))
    assert all(step(1.0 + 0.1 * (i % 3)).allowed for i in range(30))
    for _ in range(5):
        decision = step(40.0)
        assert decision.policy == "NormSpike"
        assert decision.reason == (
            "gradient norm 40 is above 1.76 (k=6 deviations over its running mean 1.1)"
        )
    assert step(1.2).allowed


def test_warm_up_lets_the_first_norms_pass():
    """Before ``warmup`` allowed steps no finite norm is a spike; NaN is, at once."""
    _, step = norms_gate(NormSpike(warmup=5))
    assert [step(n).allowed for n in (1.0, 1.0, math.nan, 1e6, 1.0, 1.0)] == [1, 1, 0, 1, 1, 1]


def test_a_steady_value_does_not_veto_its_own_rounding():
    """After a constant history a slightly larger norm passes: the deviation has a floor."""
    _, step = norms_gate(NormSpike(k=6, warmup=5, floor=0.1))
    assert all(step(2.0).allowed for _ in range(30))
    assert step(3.1).allowed
    assert not step(3.5).allowed


@pytest.mark.parametrize("offset", [0.0, -100.0])
def test_a_loss_spike_is_vetoed_also_for_negative_losses(offset):
    """LossSpike judges the distance from the running mean, so the sign of the loss does not matter."""
    _, step = norms_gate(LossSpike(k=6, warmup=5, floor=0.01))
    assert all(step(1.0, offset + 1 + 0.1 * (i % 2)).allowed for i in range(20))
    decision = step(1.0, torch.tensor(offset + 50.0))
    assert (decision.policy, decision.loss) == ("LossSpike", offset + 50.0)
    assert step(1.0, math.nan).reason == "loss is nan"
    assert step(1.0, -math.inf).reason == "loss is -inf"
    assert step(1.0, offset + 1.0).allowed


def test_a_step_is_learned_once():
    """A step whose gradients had to be counted again teaches the running mean once, not twice."""
    _, step = norms_gate(LossSpike(warmup=4))
    assert [step(math.nan, loss).allowed for loss in (1.0, 1.0, 1.0, 50.0)] == [True] * 4


def test_a_loss_is_used_once():
    """A loss that was judged does not count for the next step."""
    gate, step = norms_gate(LossSpike())
    step(1.0, 2.5)
    with pytest.warns(UserWarning, match="no loss to judge and abstains"):
        assert step(1.0).loss is None
    assert gate.counts.abstained == {"LossSpike": 1}


def test_the_loss_is_taken_as_it_was():
    """Dividing the loss in place after observe() does not change what is judged."""
    gate, step = norms_gate(LossSpike())
    loss = torch.tensor(8.0)
    gate.observe(loss=loss)
    loss /= 4
    assert step(1.0).loss == 8.0


def test_a_policy_of_ones_own():
    """A user's policy is a frozen value with a table; it joins the others."""

    class Vanishing(Policy):
        def table(self):
            return (Row(lambda r, _: r.norm < 1e-3, lambda r, _: f"norm only {r.norm:g}"),)

    _, step = norms_gate(Finite(), Vanishing())
    assert step(1.0).allowed
    assert (step(1e-4).policy, step(1e-4).reason) == ("Vanishing", "norm only 0.0001")


def test_any_signal_counts_tiny_but_real_gradients():
    """A norm just above the threshold passes, at or below it is no signal."""
    _, step = norms_gate(AnySignal())
    assert [step(n).allowed for n in (2e-12, 0.9e-12, 0.0, 1.0)] == [True, False, False, True]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AnySignal(threshold=0.0), "at least 1e-18"),
        (lambda: AnySignal(threshold=math.nan), "at least 1e-18"),
        (lambda: NormSpike(k=0), r"NormSpike\(k=0.*a finite k above 0"),
        (lambda: NormSpike(window=1), "a window of at least 2"),
        (lambda: LossSpike(warmup=0), r"LossSpike\(.*a warmup of at least 1"),
        (lambda: LossSpike(floor=-1), "a finite floor"),
    ],
)
def test_bad_options_of_policies_are_refused(make, sentence):
    """A wrong option of a policy is named, with what was expected."""
    with pytest.raises(ValueError, match=sentence):
        make()


# --- ceilings ---------------------------------------------------------------------------------------


def test_vetoes_in_a_row_have_a_ceiling():
    """Ten vetoes in a row pass, the eleventh raises with the last reason; gradients are in place."""
    gate, step = norms_gate(Finite())
    for _ in range(10):
        assert not step(math.nan).allowed
    for count in (11, 12):
        with pytest.raises(GateCeilingError, match=rf"{count} in a row .*holds NaN or Inf"):
            step(math.nan)
        assert not gate.is_hiding
    assert step(1.0).allowed
    assert not step(math.nan).allowed  # the row was broken
    assert (gate.counts.vetoed, gate.counts.attempts) == (13, 14)


def test_the_veto_rate_has_a_ceiling():
    """Vetoing 2 steps of 3 raises as soon as more than the accepted share of the window is vetoed."""
    _, step = norms_gate(Finite(), max_veto_rate=0.5, rate_window=20)
    assert sum(not step(1.0 if i % 3 == 2 else math.nan).allowed for i in range(15)) == 10
    with pytest.raises(GateCeilingError, match=r"11 of the last 16 \(max_veto_rate=0\.5"):
        step(math.nan)


def test_the_veto_rate_looks_back_over_its_window_only():
    """Every other step vetoed, for ever, is exactly the accepted half and never raises."""
    gate, step = norms_gate(Finite(), max_veto_rate=0.5, rate_window=10)
    for index in range(200):
        step(math.nan if index % 2 else 1.0)
    assert gate.counts.by_policy == {"Finite": 100}


def test_the_decisions_kept_are_bounded():
    """A long run keeps 1,000 decisions; older ones are gone, the numbering stays."""
    gate, step = norms_gate(Finite())
    for index in range(1005):
        step(math.nan if index == 1003 else 1.0)
    assert len(gate.decisions) == 1000
    assert gate.decision(4) is None
    assert [gate.decision(i).allowed for i in (5, 1003, 1004)] == [True, False, True]
    assert gate.decision(1005) is None

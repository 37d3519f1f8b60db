"""What changes from epoch to epoch: each schedule a pure function, all of them neutral by default."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradguard as gg
from reference_trainer.annealing import (
    STRUCTURE_TERMS,
    at_epoch,
    best_epoch,
    blend_at,
    dropout_at,
    progress,
    set_dropout,
    stops_early,
    structure_factor,
    temperature_at,
    weights_at,
)
from reference_trainer.averaging import AveragedWeights, averaging_share
from reference_trainer.checkpoint import load_checkpoint
from reference_trainer.config import PRESETS, Config
from reference_trainer.evaluation import Evaluation
from reference_trainer.model import CovarianceNetwork
from reference_trainer.restore import evaluate_checkpoint, restored_network
from reference_trainer.results import EpochResult
from reference_trainer.settings import preset, with_overrides
from reference_trainer.setup import assemble
from reference_trainer.train import resume, train

if TYPE_CHECKING:
    from pathlib import Path

    from reference_trainer.results import TrainingResult

SHARES = st.floats(0.0, 1.0)
SETTINGS = [
    "scenes.train=4",
    "scenes.validation=2",
    "optimization.batch_scenes=2",
    "optimization.epochs=5",
    "optimization.swa_fraction=0.4",
    "network.dropout=0.2",
    "schedules.dropout_final_share=0",
    "schedules.temperature_start=0.2",
    "schedules.temperature_end=0.08",
    "schedules.structure_start=0.4",
    "schedules.structure_rise=0.5",
    "schedules.structure_final=1.3",
    "runtime.device=cpu",
    "runtime.state_every=100",
]


@given(st.integers(1, 500))
def test_progress_goes_from_the_first_to_the_last_epoch(epochs: int) -> None:
    """0 before training and in the first epoch, 1 in the last, and rising in between."""
    values = [progress(epoch, epochs) for epoch in range(epochs + 1)]
    assert values[0] == values[1] == 0.0
    assert values[-1] == (1.0 if epochs > 1 else 0.0)
    assert values == sorted(values)


@given(SHARES, SHARES, SHARES)
def test_dropout_falls_in_a_line(done: float, initial: float, final_share: float) -> None:
    """It begins at the configured probability, ends at its share and never leaves the two."""
    ends = [dropout_at(at, initial=initial, final_share=final_share) for at in (0.0, 1.0)]
    assert ends == [initial, pytest.approx(initial * final_share)]
    value = dropout_at(done, initial=initial, final_share=final_share)
    assert min(ends) - 1e-12 <= value <= max(ends) + 1e-12


def test_the_temperature_falls_along_half_a_cosine() -> None:
    """From 0.20 to 0.08 over the first 60 %: at the ends, half way, and after it has arrived."""
    values = {
        done: temperature_at(done, start=0.20, end=0.08, fraction=0.6)
        for done in (0.0, 0.15, 0.3, 0.6, 0.9, 1.0)
    }
    quarter = 0.08 + 0.12 * (1 + math.cos(math.pi / 4)) / 2
    assert values == pytest.approx(
        {0: 0.2, 0.15: quarter, 0.3: 0.14, 0.6: 0.08, 0.9: 0.08, 1: 0.08}
    )


@given(st.floats(0.01, 2.0), st.floats(0.01, 2.0), SHARES)
def test_the_temperature_stays_between_its_ends(start: float, end: float, fraction: float) -> None:
    """No progress, fraction or direction leads out of the two temperatures."""
    for number in range(21):
        value = temperature_at(number / 20, start=start, end=end, fraction=fraction)
        assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12


def test_structure_terms_rise_stay_and_end() -> None:
    """A line up to 1, then 1, then the final factor in the last fifth."""
    given_ = {"start": 0.4, "rise": 0.5, "final": 1.3}
    values = [structure_factor(done, **given_) for done in (0.0, 0.25, 0.5, 0.79, 0.8, 1.0)]
    assert values == pytest.approx([0.4, 0.7, 1.0, 1.0, 1.3, 1.3])
    assert structure_factor(0.0, start=0.4, rise=0.0, final=1.3) == 1.0


@given(SHARES)
def test_only_structure_terms_are_ramped(done: float) -> None:
    """Every other weight is the configured one at any time."""
    config = with_overrides(
        Config(), ["schedules.structure_start=0", "schedules.structure_final=3"]
    )
    weights = weights_at(done, config.loss, config.schedules)
    same = replace(weights, **{name: getattr(config.loss, name) for name in STRUCTURE_TERMS})
    assert same == config.loss


@given(st.integers(1, 60), SHARES, st.floats(0.0, 0.3), st.integers(0, 5))
def test_the_blend_rises_and_then_jitters_about_its_share(
    epochs: int, rise: float, jitter: float, seed: int
) -> None:
    """It starts at 0, never falls while it rises, and is then within the jitter of the configured
    share; the same epoch always has the same one.
    """
    config = with_overrides(
        Config(),
        [
            f"optimization.epochs={epochs}",
            "optimization.sample_blend=0.3",
            f"network.seed={seed}",
            f"schedules.blend_rise={rise}",
            f"schedules.blend_jitter={jitter}",
        ],
    )
    shares = [blend_at(epoch, config) for epoch in range(1, epochs + 1)]
    if not rise and not jitter:
        assert set(shares) == {0.3}
        return
    rising = max(2, math.ceil(rise * epochs - 1e-9))
    assert shares[0] == 0.0
    assert shares[:rising] == sorted(shares[:rising])
    assert all(abs(share - 0.3) <= jitter + 1e-12 for share in shares[rising:])
    assert shares == [blend_at(epoch, config) for epoch in range(1, epochs + 1)]


def test_only_training_sees_the_scheduled_blend() -> None:
    """The loss of training blends by the schedule, evaluations by the share it rises to."""
    settings = ["optimization.sample_blend=0.3", "schedules.blend_rise=1"]
    config = with_overrides(preset("smoke"), settings)
    parts = assemble(config, torch.device("cpu"))
    assert [at_epoch(parts, config, epoch).objective.sample_blend for epoch in (1, 2)] == [
        0.0,
        0.15,
    ]
    assert parts.objective.sample_blend == 0.3


@pytest.mark.parametrize("name", ["overfit", "smoke"])
def test_nothing_changes_by_default(name: str) -> None:
    """Both presets train every epoch with the loss, dropout and temperature they are configured with."""
    config = PRESETS[name]
    parts = assemble(config, torch.device("cpu"))
    for epoch in (1, config.optimization.epochs // 2, config.optimization.epochs):
        assert at_epoch(parts, config, epoch).objective == parts.objective
        assert parts.model.grid.temperature == 0.15
        assert {module.p for module in parts.model.modules() if isinstance(module, nn.Dropout)} == {
            config.network.dropout
        }
    assert (parts.averaged.mean_from, config.optimization.patience) == (None, 0)


def test_dropout_reaches_attention() -> None:
    """With probability 0 the network is deterministic in train mode: nothing was missed."""
    network = CovarianceNetwork(dropout=0.5)
    encoder = network.snapshots.train()
    shown = torch.randn(2, 16, 16, 2)
    assert not torch.equal(encoder(shown), encoder(shown))
    set_dropout(network, 0.0)
    assert torch.equal(encoder(shown), encoder(shown))


def epoch(number: int, nmse: float | None) -> EpochResult:
    """Return an epoch of 100 with this held-out NMSE, or one that was not evaluated."""
    seen = None
    if nmse is not None:
        seen = Evaluation(loss=-nmse, terms={"prediction": nmse}, source_count_accuracy=0.0)
    return EpochResult(
        epoch=number, epochs=100, steps_taken=0, training_loss=None, memorised=seen, held_out=seen
    )


@pytest.mark.parametrize(
    ("nmses", "patience", "stops"),
    [
        ([0.9, 0.8, 0.81, 0.82], 2, True),
        ([0.9, 0.8, 0.81, 0.82], 3, False),
        ([0.9, 0.8, 0.81, 0.82], 0, False),
        ([0.9, 0.8, None, 0.85], 2, True),
        ([0.9, 0.8, 0.8, 0.8], 2, True),
        ([0.9, 0.8, math.nan, math.nan], 2, True),
        ([math.nan, math.nan, math.nan], 1, False),
        ([0.9, 0.8, 0.81, 0.7], 2, False),
        ([0.5], 1, False),
    ],
)
def test_training_stops_when_nothing_becomes_better(
    nmses: list[float | None], patience: int, stops: bool
) -> None:
    """Counted in epochs since the best NMSE; the loss, here its opposite, takes no part; an equal
    value is no better, NaN is never best, and epochs without evaluation are passed over.
    """
    epochs = [epoch(number, nmse) for number, nmse in enumerate(nmses)]
    assert stops_early(epochs, patience=patience) is stops


def test_the_best_epoch_is_the_first_of_the_smallest() -> None:
    """Ties go to the earlier epoch; without any number there is none."""
    assert best_epoch([epoch(0, 0.9), epoch(1, 0.5), epoch(2, 0.5)]).epoch == 1
    assert best_epoch([epoch(0, math.nan), epoch(1, None)]) is None


def test_swa_is_the_mean_of_the_weights_since_it_began() -> None:
    """Every entry of the average equals the mean of the live one over the last steps, and before
    that the exponential average.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    plain, swa = AveragedWeights(model, decay=0.9), AveragedWeights(model, decay=0.9, mean_from=4)
    live = []
    for step in range(1, 10):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        for averaged in (plain, swa):
            averaged.update()
        live.append({name: value.clone() for name, value in model.state_dict().items()})
        same = [
            torch.equal(value, plain.module.state_dict()[name])
            for name, value in swa.module.state_dict().items()
        ]
        assert all(same) == (step <= 4)
    found = swa.module.state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, value in found.items():
        mean = torch.stack([weights[name] for weights in live[4:]]).mean(dim=0)
        assert torch.allclose(value, mean, atol=1e-6)
    assert averaging_share(5, decay=0.9, mean_from=4) == 1.0


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingResult, Path]:
    """Return a run with every schedule on."""
    directory = tmp_path_factory.mktemp("scheduled") / "run"
    config = with_overrides(preset("smoke"), SETTINGS)
    return train(config, run_directory=directory), directory


def test_a_run_with_every_schedule_is_healthy(scheduled: tuple[TrainingResult, Path]) -> None:
    """Dropout, temperature, structure weights and SWA change under the guard, which finds nothing."""
    result, _ = scheduled
    assert result.log.findings == ()
    assert gg.diagnose(result.log).healthy
    assert result.model.grid.temperature == 0.08
    assert result.log.count(gg.StepOutcome.APPLIED) == 10
    weights = with_overrides(preset("smoke"), SETTINGS).loss
    first, last = result.log[0], result.log[-1]
    for record, factor in ((first, 0.4), (last, 1.3)):
        total = sum(
            getattr(weights, name) * value * (factor if name in STRUCTURE_TERMS else 1.0)
            for name, value in record.terms.items()
        )
        assert record.loss == pytest.approx(total, rel=1e-4)


def test_a_checkpoint_brings_its_temperature(scheduled: tuple[TrainingResult, Path]) -> None:
    """A restored network computes what was validated: at the temperature of its epoch."""
    result, directory = scheduled
    again = evaluate_checkpoint(directory / "checkpoint.pt")
    assert again.held_out == result.epochs[-1].held_out
    network = restored_network(load_checkpoint(directory / "checkpoint.pt"))
    assert network.grid.temperature == 0.08
    assert all(map(torch.equal, network.parameters(), result.model.parameters()))


def test_a_run_stops_early_keeps_its_best_and_stays_stopped(tmp_path: Path) -> None:
    """At a learning rate that leads nowhere, training stops after its patience; best.pt holds the
    best epoch, checkpoint.pt the last one, and resuming the stopped run trains no further.
    """
    bad = ["optimization.backbone_learning_rate=0.5", "optimization.head_learning_rate=0.5"]
    more = [
        "optimization.patience=2",
        "optimization.epochs=40",
        "scenes.train=2",
        "guard.gate=false",
    ]
    config = with_overrides(preset("smoke"), [*SETTINGS, *bad, *more])
    result = train(config, run_directory=tmp_path / "run")
    last, best = result.epochs[-1], best_epoch(result.epochs)
    assert best is not None
    assert last.last
    assert last.epoch == best.epoch + 2 < 40
    assert load_checkpoint(tmp_path / "run" / "best.pt").epoch == best.epoch
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt").epoch == last.epoch
    again = resume(tmp_path / "run")
    assert again.epochs == result.epochs
    lines = (tmp_path / "run" / "epochs.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["epoch"] == last.epoch

"""What the guard reads beside the step: forwards, modules, batches, losses, copies, loads, other optimizers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.facts import (
    BatchReading,
    CopyReading,
    ForeignStep,
    LoadReading,
    LossReading,
    MetricReading,
    ModuleReading,
    ProbeReading,
    WeightsChanged,
)
from gradguard.runlog import RunLog


def classifier():
    """A network with everything that has a mode, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.25), nn.Linear(8, 3)
    )
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def batch(rows=16):
    """Inputs and labels."""
    return torch.randn(rows, 6), torch.randint(0, 3, (rows,))


def train(model, optimizer, guard, steps, *, observe=True):
    """Take plain steps."""
    for _ in range(steps):
        x, y = batch()
        output = model(x)
        loss = nn.functional.cross_entropy(output, y)
        if observe:
            guard.observe(loss=loss, targets=y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def facts(log, kind, **fields):
    """Return the facts of one kind with these fields."""
    found = log.facts_of(kind)
    return [f for f in found if all(getattr(f, k) == v for k, v in fields.items())]


def test_forward_passes_are_counted_by_what_became_of_them():
    """Trained, dropped, evaluated in the wrong mode: each window says how many forwards were which."""
    model, optimizer = classifier()
    with gg.watch(model, optimizer, strict=True) as guard:
        train(model, optimizer, guard, 1)
        model(batch(4)[0])  # never reaches a backward
        with torch.no_grad():
            model(batch(5)[0])  # train mode
            model.eval()
            model(batch(5)[0])
        train(model, optimizer, guard, 1)
    window = guard.log[1].window
    assert (window.forwards, window.forwards_reached) == (2, 1)
    assert (window.samples, window.samples_reached) == (20, 16)
    assert (window.forwards_without_grad, window.without_grad_in_train) == (2, 1)
    assert window.forwards_in_eval == 1
    assert guard.log[0].window.forwards_in_eval == 0


def test_a_graph_of_an_earlier_step_is_seen():
    """Back-propagating again through the output of a forward before the last step is counted as stale."""
    weight = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.0)
    with gg.watch(weight, optimizer, strict=True) as guard:
        total = weight(torch.ones(2, 3)).sum()
        total.backward(retain_graph=True)
        optimizer.step()
        (total + weight(torch.ones(2, 3)).sum()).backward()
        optimizer.step()
    assert [r.window.stale_backwards for r in guard.log] == [0, 1]


def test_module_readings_agree_with_a_forward_by_hand():
    """On a detailed step the statistics are those of the tensors, in spite of in-place operations."""
    model, optimizer = classifier()
    kept = []
    probe = model[0].register_forward_hook(lambda _m, _i, out: kept.append(out.detach().clone()))
    with gg.watch(model, optimizer, strict=True) as guard:
        train(model, optimizer, guard, 1)
    probe.remove()
    (first,) = facts(guard.log, ModuleReading, module="0", step=0)
    assert first.output_rms == pytest.approx(kept[0].square().mean().sqrt().item(), rel=1e-5)
    assert first.output_max == pytest.approx(kept[0].max().item())
    (relu,) = facts(guard.log, ModuleReading, module="2", step=0)
    assert relu.output_min == 0.0
    assert relu.input_rms is None  # written over in place
    assert relu.zero_fraction > 0.2
    (norm,) = facts(guard.log, ModuleReading, module="1", step=0)
    mean, variance = model[1].running_mean, model[1].running_var
    own = kept[0].var(0, correction=0)
    shift = ((kept[0].mean(0) - mean).abs() / (variance + 1e-5).sqrt()).median()
    assert norm.statistics_shift == pytest.approx(shift.item(), rel=1e-4)
    ratio = ((own + 1e-5) / (variance + 1e-5)).median()
    assert norm.statistics_ratio == pytest.approx(ratio.item(), rel=1e-4)


def test_dead_and_saturated_units_are_shares_of_units_and_values():
    """Half of the units dead is a half; a tanh far out is saturated."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh())
    with torch.no_grad():
        model[0].bias[:4] = -1e3
        model[2].bias[:2] = 50.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gg.watch(model, optimizer, strict=True) as guard:
        model(torch.randn(32, 4)).sum().backward()
        optimizer.step()
    (relu,) = facts(guard.log, ModuleReading, module="1")
    assert relu.dead_fraction == 0.5
    (tanh,) = facts(guard.log, ModuleReading, module="3")
    assert 0.5 <= tanh.saturated_fraction < 0.7


@pytest.mark.parametrize(
    ("rows", "interior"),
    [
        ([[5, 3, 0, 0], [4, 0, 0, 0]], 0.0),  # at the end
        ([[0, 0, 5, 3], [0, 4, 2, 6]], 0.0),  # in front
        ([[5, 0, 3, 0], [4, 0, 0, 7]], 0.75),  # three of four stand between others
        ([[5, 3, 2, 1], [4, 6, 2, 1]], 0.0),  # none at all
        ([[0, 0, 0, 0], [4, 0, 5, 6]], 0.2),  # an empty row has no others
    ],
)
def test_padding_between_other_tokens_is_told_from_padding_at_the_ends(rows, interior):
    """The share counts padded positions with other tokens on both sides in their row."""
    model = nn.Sequential(nn.Embedding(8, 4, padding_idx=0), nn.Flatten(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gg.watch(model, optimizer) as guard:
        model(torch.tensor(rows)).sum().backward()
        optimizer.step()
    (reading,) = facts(guard.log, ModuleReading, module="0")
    assert reading.padding_interior == pytest.approx(interior)


def test_batches_are_known_by_their_rows():
    """The same rows have the same fingerprint in the loader, the forward and another split."""
    model, optimizer = classifier()
    data = [batch() for _ in range(2)]
    with gg.watch(model, optimizer, strict=True) as guard:
        for x, y in guard.batches(data):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        for _ in guard.batches(data, split="validation"):
            pass
    trained = facts(guard.log, BatchReading, split="train", tensor="inputs", source="loader")
    given = facts(guard.log, BatchReading, split="train", tensor="inputs", source="forward")
    held = facts(guard.log, BatchReading, split="validation", tensor="inputs")
    assert [r.rows for r in trained] == [r.rows for r in given] == [r.rows for r in held]
    assert len(set(trained[0].rows)) == 16
    assert [r.batches for r in guard.log] == [1, 1]  # the other split is not counted
    labels = facts(guard.log, BatchReading, tensor="targets")[0]
    values, counts = data[0][1].unique(return_counts=True)
    assert labels.distinct == len(values)
    assert labels.top_share == counts.max().item() / 16


def test_targets_that_repeat_the_inputs_are_seen():
    """Shifted tokens match at their shift only; a target that is an input feature correlates perfectly."""
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 50))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(0, 50, (8, 20))
    with gg.watch(model, optimizer, strict=True) as guard:
        loss = nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        guard.observe(loss=loss, targets=tokens[:, 1:])
        loss.backward()
        optimizer.step()
    (reading,) = facts(guard.log, BatchReading, source="observe")
    assert reading.shift_match["1"] == 1.0
    assert reading.shift_match["0"] < 0.2


def test_the_graph_of_a_loss_is_read_down_to_the_models_output():
    """Operations between loss and output, the output's shape, and what the loss reaches."""
    model, optimizer = classifier()
    with gg.watch(model, optimizer, strict=True) as guard:
        x, y = batch()
        output = model(x)
        loss = nn.functional.cross_entropy(output.softmax(1), y)
        guard.observe(loss=loss)
        loss.backward()
        optimizer.step()
    (reading,) = facts(guard.log, LossReading)
    assert [n.name for n in reading.nodes] == ["NllLoss", "LogSoftmax", "Softmax", "Addmm"]
    assert reading.nodes[1].dim == 1
    assert reading.output_shape == (16, 3)
    assert (reading.reached, reading.unreached) == (6, ())


def test_copies_are_read_beside_the_live_weights():
    """An aliased snapshot shares memory, a frozen teacher stands still, an average lags behind."""
    model, optimizer = classifier()
    teacher, average = copy.deepcopy(model), copy.deepcopy(model)
    alias = model.state_dict()
    with gg.watch(model, optimizer, averaged=average, strict=True) as guard:
        guard.follow_copy("teacher", teacher, role="frozen")
        guard.follow_copy("best", alias, role="snapshot")
        for _ in range(4):
            train(model, optimizer, guard, 1)
            for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
                ours.data.lerp_(theirs.data, 0.1)
    last = {f.name: f for f in guard.log.facts_of(CopyReading)}
    assert last["best"].shared_tensors == len([t for t in alias.values() if t.numel()])
    assert last["teacher"].changed is False
    assert last["teacher"].copy_moved == 0.0
    assert last["teacher"].lag > 0
    assert last["averaged"].shared_tensors == 0
    assert last["averaged"].matched == 1.0
    assert last["averaged"].copy_moved > 0
    assert last["averaged"].buffers_differ > 0  # nobody updates them


def test_loading_is_noted_and_overwriting_what_was_loaded_too():
    """A checkpoint with a prefix matches nothing; an initialisation after a load is seen at the next step."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    prefixed = {f"module.{k}": v for k, v in model.state_dict().items()}
    with gg.watch(model, optimizer, strict=True) as guard:
        model.load_state_dict(prefixed, strict=False)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        train(model, optimizer, guard, 1)  # nothing happened in between
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        nn.init.normal_(model[0].weight)
        train(model, optimizer, guard, 1)
    loads = guard.log.facts_of(LoadReading)
    assert [(f.matched, f.expected) for f in loads] == [(0, 4), (4, 4), (4, 4)]
    (changed,) = guard.log.facts_of(WeightsChanged)
    assert changed.parameters == ("0.weight",)
    assert changed.step == 1


def test_another_optimizer_on_the_same_parameters_is_noticed():
    """An optimizer made anew while the old one stands still is told apart from one for another model."""
    model, optimizer = classifier()
    other = nn.Linear(2, 2)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    with gg.watch(model, optimizer, strict=True) as guard:
        train(model, optimizer, guard, 1)
        anew = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            other(torch.ones(1, 2)).sum().backward()
            elsewhere.step()
            model(batch()[0]).sum().backward()
            anew.step()
    found = guard.log.facts_of(ForeignStep)
    assert {f.shared for f in found} == {6}
    assert found[-1].same_kind


def test_reported_numbers_and_own_probes_are_kept():
    """What the user reports is a fact, whether it was a float or a tensor; an unknown probe is refused."""
    model, optimizer = classifier()
    with gg.watch(model, optimizer, strict=True) as guard:
        guard.report("accuracy", torch.tensor(0.75), split="validation", weights="live")
        guard.report("cost", math.inf)
        guard.probe("loss at truth", torch.tensor(2.5))
        with pytest.raises(ValueError, match="expected one of"):
            guard.probe("feeling", 1.0)
    assert [(f.name, f.value) for f in guard.log.facts_of(MetricReading)] == [
        ("accuracy", 0.75),
        ("cost", math.inf),
    ]
    assert [f.value for f in guard.log.facts_of(ProbeReading)] == [2.5]


def test_every_fact_survives_the_file():
    """A log with readings of every sensor is the same after a round trip through JSON Lines."""
    model, optimizer = classifier()
    with gg.watch(model, optimizer, averaged=copy.deepcopy(model)) as guard:
        train(model, optimizer, guard, 4)
        model.load_state_dict(model.state_dict())
        guard.report("accuracy", 0.5)
        guard.probe("loss at truth", 0.0)
    assert RunLog.from_jsonl(guard.log.to_jsonl()).facts == guard.log.facts


def test_modules_that_were_never_called_are_told_from_cut_ones():
    """A layer that no forward calls is uncalled; one whose output is detached is not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.cut, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x + self.cut(x).detach())

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gg.watch(model, optimizer, strict=True) as guard:
        for _ in range(3):
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
    window = guard.log[2].window
    assert set(window.never_gradient) == {"cut.weight", "cut.bias", "spare.weight", "spare.bias"}
    assert window.uncalled == ("spare.weight", "spare.bias")


def test_a_fault_in_a_sensor_stays_in_the_sensor(monkeypatch):
    """When a reading raises, the run goes on, one finding says so, and the steps are still recorded."""
    from gradguard.sensors import module_watch

    def broken(*_):
        raise ZeroDivisionError("sensor")

    monkeypatch.setattr(module_watch, "forward_statistics", broken)
    model, optimizer = classifier()
    with gg.watch(model, optimizer) as guard:
        train(model, optimizer, guard, 3)
    assert [f.code for f in guard.findings] == ["GG001"]
    assert len(guard.log) == 3

"""Judging networks: every estimator on the same scenes, beside the bound, as JSON, tables and figures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reference_trainer import cli
from reference_trainer.bound import cramer_rao_bound, sent_symbols
from reference_trainer.checkpoint import Checkpoint, save_checkpoint
from reference_trainer.data import scene_physics
from reference_trainer.errors import CheckpointError, ConfigError, DataError
from reference_trainer.likelihood import maximum_likelihood
from reference_trainer.localisation import bench, run
from reference_trainer.localisation.estimators import PUBLISHED_GRID, estimators
from reference_trainer.localisation.example import Example, example_of
from reference_trainer.localisation.figures import write_figures
from reference_trainer.localisation.hybrid import seen_by, starting_factors
from reference_trainer.localisation.judging import judge
from reference_trainer.localisation.plan import Plan
from reference_trainer.localisation.report import EstimatorReport, NetworkReport, Report
from reference_trainer.localisation.report_file import as_json, from_json, read_report, write_report
from reference_trainer.localisation.subject import checkpoint_in, draw_held_out, load_subject
from reference_trainer.localisation.tables import markdown_tables
from reference_trainer.matching import source_errors
from reference_trainer.metrics import ErrorSummary, summarise
from reference_trainer.music import music
from reference_trainer.physics import SymbolModel
from reference_trainer.positions import true_positions
from reference_trainer.refinement import refine
from reference_trainer.scenes import Scenes, draw_scenes
from reference_trainer.settings import as_mapping, from_mapping, preset
from reference_trainer.setup import new_network

CPU = torch.device("cpu")
PLAN = Plan(seed=5, scenes=24, subset=8)
SLOW = {"ml_scratch", "ml_scratch_coarse"}
ROWS = SLOW | {
    "network_music",
    "ml_network",
    "ml_field",
    "network_alone_music",
    "blend_music",
    "refitted_music",
    "fitted_music",
    "field_music",
    "true_music",
}


def save_untrained(
    directory: Path, *, symbols: SymbolModel = "constant", source: str = "memory"
) -> Path:
    """Write the checkpoint of a network that was never trained; return its path."""
    config = preset("smoke")
    config = replace(config, scenes=replace(config.scenes, symbols=symbols, source=source))
    torch.manual_seed(0)
    checkpoint = Checkpoint(
        config=as_mapping(config),
        weights=new_network(config).state_dict(),
        epoch=0,
        steps_taken=0,
        validation_loss=float("nan"),
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "checkpoint.pt"
    save_checkpoint(path, checkpoint)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[SymbolModel, Path]:
    """Untrained networks, one for each symbol model."""
    root = tmp_path_factory.mktemp("runs")
    models: tuple[SymbolModel, ...] = ("constant", "iid")
    return {symbols: save_untrained(root / symbols, symbols=symbols) for symbols in models}


@pytest.fixture(scope="module")
def report(checkpoints: dict[SymbolModel, Path]) -> Report:
    """What an untrained network and the classical estimators reach with constant symbols."""
    return judge([load_subject(checkpoints["constant"], device=CPU)], PLAN)


@pytest.fixture(scope="module")
def network(report: Report) -> NetworkReport:
    """The one network of the report."""
    return report.networks[0]


@pytest.fixture(scope="module")
def scenes(checkpoints: dict[SymbolModel, Path]) -> Scenes:
    """The scenes of the report, drawn again."""
    physics = load_subject(checkpoints["constant"], device=CPU).physics
    return draw_scenes(physics, seed=PLAN.seed, split=PLAN.split, indices=range(PLAN.scenes))


def row(network: NetworkReport, key: str) -> EstimatorReport:
    """One row of the report."""
    return next(one for one in network.estimators if one.key == key)


def summaries(network: NetworkReport) -> list[ErrorSummary]:
    """Every summary of a report, of all scenes, the subset and their parts."""
    errors = [one.known for one in network.estimators]
    errors += [one.estimated for one in network.estimators if one.estimated is not None]
    parts = [part for one in errors for part in (one.all, one.subset) if part is not None]
    found = [one for part in parts for one in (part.overall, part.high_snr)]
    found += [one for part in parts for one in part.by_count.values()]
    return found + [bin_.summary for part in parts for bin_ in part.by_snr]


def test_a_report_survives_json(report: Report, tmp_path: Path) -> None:
    """What is written is strict JSON, without NaN, and reads back as the same report."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    path = tmp_path / "report.json"
    write_report(path, report)
    assert read_report(path) == report
    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["schema_version"] == 1
    assert content["conditions"]["scenes"] == PLAN.scenes
    assert content["networks"][0]["origin"]["config"]["network"]["seed"] == 0
    assert content["networks"][0]["origin"]["validation_loss"] is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_every_estimator_has_a_row(network: NetworkReport) -> None:
    """Each row stands once; slow ones are measured on the subset, the others on all scenes too."""
    keys = [one.key for one in network.estimators]
    assert sorted(keys) == sorted(ROWS)
    for one in network.estimators:
        assert one.known.subset.overall.scenes == PLAN.subset
        assert (one.known.all is None) == (one.key in SLOW)
        assert one.cost.scenes == (PLAN.subset if one.key in SLOW else PLAN.scenes)
        assert one.cost.wall_s > 0
        assert (one.estimated is None) == (one.counted_by is None)
    assert {one.key for one in network.counters} == {"head", "mdl", "aic", "bic"}
    assert [one.key for one in network.covariances] == [
        "true",
        "sample",
        "network",
        "blend",
        "hybrid",
    ]


def test_counts_add_up(network: NetworkReport) -> None:
    """Every true source is matched or missed, in every part; the parts make up the whole."""
    for summary in summaries(network):
        assert summary.matched + summary.missed == summary.true_sources
    for one in network.estimators:
        assert one.known.subset.overall.missed == one.known.subset.overall.false == 0
        for part in (one.known.all, one.known.subset):
            if part is not None:
                total = part.overall.true_sources
                assert sum(bin_.summary.true_sources for bin_ in part.by_snr) == total
                assert sum(one.true_sources for one in part.by_count.values()) == total
                assert sum(bin_.summary.scenes for bin_ in part.by_snr[3:]) == part.high_snr.scenes


def test_the_true_covariance_leaves_no_error(network: NetworkReport) -> None:
    """MUSIC on the truth finds all sources: a check of conventions from scenes to metrics."""
    overall = row(network, "true_music").known.all.overall
    assert overall.within_1_deg == 1.0
    assert max(overall.azimuth_deg.rmse, overall.elevation_deg.rmse) < 0.05
    assert overall.range_m.rmse < 0.05


def test_maximum_likelihood_reaches_the_bound_at_high_snr(network: NetworkReport) -> None:
    """From scratch, at 10 dB and more, the median error is about 0.67 of the bound."""
    high = row(network, "ml_scratch").known.subset.high_snr
    assert high.true_sources >= 6
    for coordinate in (high.azimuth_deg, high.elevation_deg, high.range_m):
        assert 0.3 < coordinate.median_over_bound < 1.2


def test_the_bound_stands_beside_every_row(network: NetworkReport, scenes: Scenes) -> None:
    """It is the same in all rows of the same scenes, and the one that belongs to these scenes."""
    physics = scene_physics(from_mapping(network.origin.config).scenes)
    symbols = sent_symbols(
        physics, scenes, seed=PLAN.seed, split=PLAN.split, indices=range(PLAN.scenes)
    )
    azimuth = cramer_rao_bound(physics, scenes, symbols).azimuth_rad.rad2deg()
    values = azimuth[scenes.active].numpy()
    for one in network.estimators:
        if one.known.all is not None:
            found = one.known.all.overall.azimuth_deg.median_bound
            assert found == pytest.approx(np.median(values))


def test_rows_are_what_the_estimators_say(
    network: NetworkReport, scenes: Scenes, checkpoints: dict[SymbolModel, Path]
) -> None:
    """Batches, the subset and the reuse of positions change nothing: plain calls give the rows."""
    subject = load_subject(checkpoints["constant"], device=CPU)
    physics, model = subject.physics, subject.network
    truth = true_positions(scenes)
    counted = seen_by(model, scenes).num_sources
    assert bool((counted != scenes.num_sources).any())
    plain = {one.key: one for one in estimators(model, share=PLAN.share)}
    for numbers, name in ((scenes.num_sources, "known"), (counted, "estimated")):
        for key in ("network_alone_music", "ml_network", "network_music"):
            expected = summarise(source_errors(plain[key].locate(physics, scenes, numbers), truth))
            found = getattr(row(network, key), name).all.overall
            assert (found.missed, found.false) == (expected.missed, expected.false)
            assert found.azimuth_deg.median == pytest.approx(expected.azimuth_deg.median, rel=1e-2)
            assert found.range_m.median == pytest.approx(expected.range_m.median, rel=1e-2)
    few = scenes.select(slice(0, PLAN.subset))
    fit = maximum_likelihood(physics, few, few.num_sources, grid=PUBLISHED_GRID).positions
    expected = summarise(source_errors(fit, true_positions(few)))
    found = row(network, "ml_scratch").known.subset.overall
    assert found.azimuth_deg.median == pytest.approx(expected.azimuth_deg.median, rel=1e-2)


def test_ml_starts_from_the_blend_and_from_the_field(
    scenes: Scenes, checkpoints: dict[SymbolModel, Path]
) -> None:
    """Network-started ML is the refinement from MUSIC on both starting covariances, and no other."""
    subject = load_subject(checkpoints["constant"], device=CPU)
    physics, model = subject.physics, subject.network
    one = next(one for one in estimators(model, share=0.3) if one.key == "ml_network")
    starts = [
        music(physics, factor, scenes.num_sources) for factor in starting_factors(model, scenes)
    ]
    expected = refine(physics, scenes, *starts).positions
    found = one.locate(physics, scenes, scenes.num_sources)
    torch.testing.assert_close(found.azimuth_rad, expected.azimuth_rad)
    assert not torch.allclose(starts[0].azimuth_rad, starts[1].azimuth_rad)


def test_a_cost_holds_the_look_at_the_scenes(network: NetworkReport) -> None:
    """The seconds of the hybrid hold those of the fitted covariance and of the network."""
    hybrid, fitted = row(network, "network_music").cost, row(network, "fitted_music").cost
    assert hybrid.processor_s > fitted.processor_s


def test_counting_is_told_for_all_and_for_the_subset(
    network: NetworkReport, scenes: Scenes, checkpoints: dict[SymbolModel, Path]
) -> None:
    """The confusion holds every scene once; BIC is on the subset only, where all can be compared."""
    for one in network.counters:
        assert (one.all is None) == (one.key == "bic")
        assert sum(map(sum, one.subset.overall.confusion)) == PLAN.subset
        if one.all is not None:
            assert sum(map(sum, one.all.overall.confusion)) == PLAN.scenes
    subject = load_subject(checkpoints["constant"], device=CPU)
    right = (seen_by(subject.network, scenes).num_sources == scenes.num_sources).float().mean()
    assert network.counters[0].all.overall.accuracy == pytest.approx(float(right))


def test_ranks_stand_beside_chance(network: NetworkReport, scenes: Scenes) -> None:
    """The true covariance has rank K and its own subspace; an untrained network knows no more than
    chance.
    """
    true, sample, predicted, blend, hybrid = (one.overall for one in network.covariances)
    mean_count = float(scenes.num_sources.double().mean())
    assert true.count == pytest.approx(mean_count)
    assert true.overlap == pytest.approx(1.0, abs=1e-3)
    assert true.chance == pytest.approx(mean_count / 144)
    assert sample.overlap > 0.5
    assert predicted.overlap < 5 * predicted.chance
    assert blend.count == pytest.approx(predicted.count + sample.count, abs=0.5)
    assert hybrid.overlap > 0.5


def test_tables_say_everything_that_was_measured(report: Report) -> None:
    """Every table is rectangular; every estimator, counter and covariance is named; what was not
    measured is a dash; and a report from a file gives the same text.
    """
    text = markdown_tables(report)
    assert markdown_tables(from_json(as_json(report))) == text
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    network = report.networks[0]
    for one in (*network.estimators, *network.counters, *network.covariances):
        assert f"| {one.title}" in text
    assert "| BIC of the ML fits | - | - |" in text
    assert "nan" not in text
    assert "None" not in text


def test_figures_are_drawn(
    report: Report, checkpoints: dict[SymbolModel, Path], tmp_path: Path
) -> None:
    """Four PNG files for a network, each with something in it; the example fits the plan."""
    example = example_of(load_subject(checkpoints["constant"], device=CPU), PLAN)
    assert int(example.true.num_sources) == 3
    assert example.snr_db >= 10
    assert all(float(shares.sum()) <= 1.001 for shares in example.eigenvalues.values())
    paths = write_figures(report, [example], tmp_path / "figures")
    names = sorted(path.name for path in paths)
    kinds = ("confusion", "eigenvalues", "error-by-snr", "spectrum")
    assert names == [f"{kind}-1-constant.png" for kind in kinds]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        assert path.stat().st_size > 10_000


def test_workers_change_nothing_but_the_time(
    checkpoints: dict[SymbolModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches worked on at the same time end in the order of the scenes, with the same figures."""
    monkeypatch.setattr(bench, "BATCH_SCENES", 3)
    subject = load_subject(checkpoints["iid"], device=CPU)
    alone, together = (
        judge([subject], Plan(seed=1, scenes=8, subset=1, workers=workers)).networks[0]
        for workers in (1, 3)
    )
    for one, other in zip(alone.estimators, together.estimators, strict=True):
        assert (one.known, one.estimated) == (other.known, other.estimated)
    assert [one.all for one in alone.counters] == [one.all for one in together.counters]


def test_judging_leaves_no_trace(checkpoints: dict[SymbolModel, Path]) -> None:
    """Weights, threads and torch's random state are as before; progress ends where it should."""
    subject = load_subject(checkpoints["iid"], device=CPU)
    weights = [parameter.clone() for parameter in subject.network.parameters()]
    state, threads, heard = torch.get_rng_state(), torch.get_num_threads(), {}
    used = set()

    def told(what: str, done: int, total: int) -> None:
        heard[what] = (done, total)
        used.add(torch.get_num_threads())

    torch.set_num_threads(threads + 1)
    try:
        found = judge([subject], Plan(seed=1, scenes=3, subset=1, threads=1), told=told)
        assert (used, torch.get_num_threads()) == ({1}, threads + 1)
    finally:
        torch.set_num_threads(threads)
    assert found.networks[0].symbols == "iid"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, weights, subject.network.parameters()))
    assert all(done == total for done, total in heard.values())
    assert all(what.startswith("iid: ") for what in heard)


def test_the_command_writes_everything(
    capsys: pytest.CaptureFixture[str],
    checkpoints: dict[SymbolModel, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Run directories of two symbol models give one report with both, tables and figures."""
    drawn = []

    def draw(report: Report, examples: list[Example], directory: Path) -> tuple[Path, ...]:
        drawn.extend(zip(report.networks, examples, strict=True))
        return (directory / "picture.png",)

    monkeypatch.setattr(run, "figure_writer", lambda: draw)
    directories = [str(path.parent) for path in checkpoints.values()]
    results, pictures = tmp_path / "new" / "report.json", tmp_path / "pictures"
    few = ["--scenes", "2", "--subset", "1", "--no-losses"]
    with pytest.raises(SystemExit) as left:
        cli.main(
            ["evaluate", *directories, *few, "--json", str(results), "--figures", str(pictures)]
        )
    captured = capsys.readouterr()
    assert (left.value.code or 0, captured.err) == (0, "")
    assert [one.symbols for one in read_report(results).networks] == ["constant", "iid"]
    assert len(drawn) == 2
    assert "bound, on the subset" in captured.out
    assert f"written: {results}\nwritten: {pictures / 'picture.png'}\n" in captured.out


def test_fresh_training_scenes_need_no_comparison(tmp_path: Path) -> None:
    """A network that saw fresh scenes cannot be compared scene by scene; the streams are the proof,
    and judging on its own training stream is refused.
    """
    subject = load_subject(save_untrained(tmp_path, source="fly"), device=CPU)
    disjoint = draw_held_out(subject, seed=0, split="validation", count=2).disjoint
    assert (disjoint.method, disjoint.compared, disjoint.watched) == ("streams", 0, 2)
    assert "random streams are others" in disjoint.reason
    with pytest.raises(DataError, match="ever fresh scenes"):
        draw_held_out(subject, seed=0, split="train", count=2)


def test_scenes_that_were_trained_on_are_refused(checkpoints: dict[SymbolModel, Path]) -> None:
    """Training scenes are found by their fingerprints; others, of the same split, are none."""
    subject = load_subject(checkpoints["constant"], device=CPU)
    with pytest.raises(DataError, match="3 of the 3 scenes to judge on were trained on"):
        draw_held_out(subject, seed=0, split="train", count=3)
    disjoint = draw_held_out(subject, seed=9, split="train", count=3).disjoint
    assert (disjoint.method, disjoint.compared, disjoint.watched) == ("fingerprints", 16, 0)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"scenes": 10, "subset": 11}, "a subset of 11 of 10 scenes"),
        ({"scenes": 0}, "scenes is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"share": 1.0}, "share of the sample covariance is 1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(fields: dict[str, float], told: str) -> None:
    """Each field is checked, and the message says what came and what was expected."""
    with pytest.raises(ConfigError, match=told):
        Plan(**fields)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--scenes", "10", "--subset", "11"], "a subset of 11 of 10 scenes"),
        (["--split", "moon"], "the split is 'moon'; expected train or validation or test"),
        (["--device", "moon"], "the device is 'moon'"),
    ],
)
def test_a_mistake_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
    checkpoints: dict[SymbolModel, Path],
    arguments: list[str],
    told: str,
) -> None:
    """Status 2, nothing on standard output, and one sentence, before anything is measured."""
    assert told in complaint(capsys, "evaluate", str(checkpoints["constant"]), *arguments)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one sentence on standard error of a command that must fail with status 2."""
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert (left.value.code, captured.out) == (2, "")
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_without_matplotlib_one_sentence_says_what_to_install(
    capsys: pytest.CaptureFixture[str],
    checkpoints: dict[SymbolModel, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Figures that cannot be drawn are told before the work, not after it."""
    monkeypatch.delitem(sys.modules, "reference_trainer.localisation.figures")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = ("evaluate", str(checkpoints["constant"]), "--figures", str(tmp_path))
    assert "pip install gradguard[figures]" in complaint(capsys, *arguments)


def test_a_place_that_cannot_be_written_is_told_at_once(
    capsys: pytest.CaptureFixture[str], checkpoints: dict[SymbolModel, Path], tmp_path: Path
) -> None:
    """A directory in place of a file, or a file in place of a directory, is one sentence."""
    (tmp_path / "file").write_text("precious")
    start = ("evaluate", str(checkpoints["constant"]), "--json")
    assert "it is a directory" in complaint(capsys, *start, str(tmp_path))
    assert "could not make" in complaint(capsys, *start, str(tmp_path / "file" / "report.json"))


def test_a_run_directory_means_its_best_checkpoint(tmp_path: Path) -> None:
    """The best one where training may have gone on too long, else the last; without one, an error
    names the directory.
    """
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no checkpoint.pt"):
        checkpoint_in(tmp_path)
    for name in ("checkpoint.pt", "best.pt"):
        (tmp_path / name).touch()
        assert checkpoint_in(tmp_path) == tmp_path / name
    assert checkpoint_in(tmp_path / "other.pt") == tmp_path / "other.pt"


@pytest.mark.parametrize("content", ["", "{}", '{"schema_version": 2}', "[1, 2"])
def test_a_foreign_report_is_refused(tmp_path: Path, content: str) -> None:
    """A file that is no report of this version says so, and where it stopped making sense."""
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(DataError, match="no report of localisation, version 1"):
        read_report(path)


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds(
    report: Report, checkpoints: dict[SymbolModel, Path]
) -> None:
    """Judged on CUDA, estimators that do not depend on an untrained network have the same errors."""
    plan = replace(PLAN, device="cuda")
    subject = load_subject(checkpoints["constant"], device=torch.device("cuda"))
    found = judge([subject], plan).networks[0]
    for key in ("ml_scratch", "fitted_music", "field_music", "true_music"):
        one, other = row(found, key).known.subset, row(report.networks[0], key).known.subset
        expected = pytest.approx(other.overall.azimuth_deg.median, rel=0.05, abs=1e-3)
        assert one.overall.azimuth_deg.median == expected

"""Scenes on the disk are the scenes that were drawn, or a sentence that says why not."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from reference_trainer import cli
from reference_trainer.data import DataSets, StoredScenes, draw_data, training_physics
from reference_trainer.errors import DataError
from reference_trainer.physics import ScenePhysics
from reference_trainer.scenes import Scenes, draw_scenes
from reference_trainer.settings import preset, with_overrides
from reference_trainer.stored_scenes import open_scenes, write_scenes
from reference_trainer.train import train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from reference_trainer.config import Config

CPU = torch.device("cpu")
PHYSICS = ScenePhysics(symbols="iid", element_jitter=0.05)
COUNT = 300  # more than one chunk


def opened(
    directory: Path, physics: ScenePhysics = PHYSICS, *, seed: int = 7, count: int = COUNT
) -> Scenes:
    """Open training scenes."""
    return open_scenes(directory, physics, seed=seed, split="train", count=count)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of 300 training scenes."""
    directory = tmp_path_factory.mktemp("scenes") / "train"
    write_scenes(directory, PHYSICS, seed=7, split="train", count=COUNT)
    return directory


def same(one: Scenes, other: Scenes) -> bool:
    """Compare bit for bit."""
    names = [field.name for field in fields(Scenes)]
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_what_is_read_is_what_was_drawn(stored: Path) -> None:
    """All scenes, the first few and any selection equal those drawn afresh, bit for bit."""
    drawn = draw_scenes(PHYSICS, seed=7, split="train", indices=range(COUNT))
    assert same(opened(stored), drawn)
    assert same(opened(stored, count=9), drawn.select(slice(0, 9)))
    index = torch.tensor([299, 0, 256, 255])
    assert same(opened(stored).select(index), drawn.select(index))


def test_files_are_plain_little_endian_arrays_that_nobody_changes(stored: Path) -> None:
    """NumPy alone reads them; writing to an opened tensor does not reach the file."""
    scenes = opened(stored)
    before = (stored / "snr_db.npy").read_bytes()
    array = np.load(stored / "snr_db.npy")
    assert array.dtype.str == "<f4"
    assert np.array_equal(array, scenes.snr_db.numpy())
    scenes.snr_db.zero_()
    assert (stored / "snr_db.npy").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": 8}, "drawn with seed=7, the run wants 8"),
        ({"count": 301}, "holds 300 scenes, the run wants 301"),
        ({"physics": replace(PHYSICS, symbols="constant")}, "symbols='iid', the run wants 'const"),
        ({"physics": replace(PHYSICS, element_jitter=0.0)}, "element_jitter=0.05, the run wants 0"),
    ],
)
def test_other_scenes_are_refused(stored: Path, options: dict[str, object], told: str) -> None:
    """Seed, number and every field of the physics must be those of the run."""
    with pytest.raises(DataError, match=told):
        opened(stored, **options)


def cut(directory: Path) -> None:
    """Cut a file short."""
    path = directory / "channel.npy"
    path.write_bytes(path.read_bytes()[:-1000])


def flip(directory: Path) -> None:
    """Flip one bit."""
    path = directory / "codes.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lose(directory: Path) -> None:
    """Lose a file."""
    (directory / "snapshots.npy").unlink()


def stop_early(directory: Path) -> None:
    """Leave what a killed writer leaves."""
    (directory / "scenes.json").unlink()


def claim(directory: Path) -> None:
    """Put the manifest of another program in its place."""
    (directory / "scenes.json").write_text(json.dumps({"format": "other"}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "channel.npy"),
        (flip, "codes.npy is not what was written"),
        (lose, "could not map .*snapshots.npy"),
        (stop_early, "holds no scenes"),
        (claim, "is of another program"),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, damage: Callable[[Path], None], told: str) -> None:
    """Torn, changed, lost, unfinished and foreign directories are refused."""
    write_scenes(tmp_path / "s", PHYSICS, seed=7, split="train", count=3)
    damage(tmp_path / "s")
    with pytest.raises(DataError, match=told) as refused:
        opened(tmp_path / "s", count=2)
    assert "\n" not in str(refused.value)


def test_a_directory_in_use_is_left_alone(stored: Path) -> None:
    """Nothing is overwritten."""
    before = sorted(path.name for path in stored.iterdir())
    with pytest.raises(DataError, match="holds something already"):
        write_scenes(stored, PHYSICS, seed=8, split="train", count=1)
    assert sorted(path.name for path in stored.iterdir()) == before


def configured(*settings: str) -> Config:
    """Return a run of six scenes with jittered elements."""
    small = ["scenes.train=6", "scenes.validation=3", "optimization.batch_scenes=2"]
    more = ["scenes.element_jitter=0.05", "runtime.device=cpu", "runtime.state_every=100"]
    return with_overrides(preset("smoke"), [*small, *more, *settings])


def test_a_run_from_the_disk_is_the_run_from_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Written by the command and trained on, the same scenes give the same weights bit for bit; the
    guard finds nothing.
    """
    directory = tmp_path / "scenes"
    arguments = ["--set", "scenes.train=6", "--set", "scenes.element_jitter=0.05"]
    with pytest.raises(SystemExit) as left:
        cli.main(["scenes", str(directory), "--preset", "smoke", *arguments])
    assert left.value.code == 0
    assert f"6 scenes in {directory}" in capsys.readouterr().out
    memory = train(configured())
    disk = train(configured("scenes.source=disk", f"scenes.directory={directory}"))
    assert all(map(torch.equal, disk.model.parameters(), memory.model.parameters()))
    assert disk.log.findings == ()
    assert (disk.start.memorised_scenes, disk.start.source) == (6, "disk")


def test_only_the_scenes_to_evaluate_are_loaded(stored: Path) -> None:
    """Of scenes on the disk as many are evaluated as are held out; the rest stays where it is."""
    scenes = with_overrides(
        preset("smoke"),
        [
            "scenes.source=disk",
            f"scenes.directory={stored}",
            "scenes.symbols=iid",
            "scenes.seed=7",
            "scenes.train=200",
            "scenes.validation=5",
            "scenes.element_jitter=0.05",
        ],
    ).scenes
    data: DataSets = draw_data(scenes, device=CPU)
    assert isinstance(data.training, StoredScenes)
    assert (len(data.training), len(data.memorised), len(data.held_out)) == (200, 5, 5)
    drawn = draw_scenes(training_physics(scenes), seed=7, split="train", indices=[150, 3])
    assert same(data.training.select(torch.tensor([150, 3])).scenes, drawn)


@pytest.mark.parametrize(
    "settings", [["scenes.source=disk"], ["scenes.directory=somewhere", "scenes.source=fly"]]
)
def test_a_directory_belongs_to_the_disk(settings: list[str]) -> None:
    """A source without its directory, or a directory without its source, is one sentence."""
    with pytest.raises(ValueError, match="give a directory for source disk, and for no other"):
        with_overrides(preset("smoke"), settings)

"""Configurations: every key explained, every mistake one sentence that names the key."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.config import PRESETS, Config
from reference_trainer.errors import ConfigError
from reference_trainer.settings import (
    as_mapping,
    config_keys,
    from_mapping,
    preset,
    with_overrides,
)

NAMES = [key.name for key in config_keys()]


def test_every_key_has_a_meaning() -> None:
    """No setting is left unexplained: the help is made of these sentences."""
    for key in config_keys():
        assert len(key.meaning) > 15, key.name
        assert key.meaning.endswith("."), key.name


def test_the_keys_are_the_whole_configuration() -> None:
    """The list of settings holds each leaf of the configuration once, with its default."""
    tree = as_mapping(Config())
    leaves = {f"{section}.{name}": v for section, keys in tree.items() for name, v in keys.items()}
    assert {key.name: key.default for key in config_keys()} == leaves


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_json(name: str) -> None:
    """Saved as JSON with a run and read back, a preset is the same configuration."""
    assert from_mapping(json.loads(json.dumps(as_mapping(preset(name))))) == preset(name)


@given(st.sampled_from(config_keys()))
def test_writing_a_default_changes_nothing(key: object) -> None:
    """``--set`` with the text of a default value reads back as exactly that value."""
    assert with_overrides(Config(), [f"{key.name}={key.default}"]) == Config()


def test_the_last_assignment_wins() -> None:
    """Assignments apply in order; spaces around key and value do not count."""
    config = with_overrides(Config(), ["optimization.epochs=3", " optimization.epochs = 7 "])
    assert config.optimization.epochs == 7


def test_a_loss_scale_may_be_a_power_of_two() -> None:
    """``2**24`` means 16777216."""
    config = with_overrides(Config(), ["precision.initial_loss_scale=2**24"])
    assert config.precision.initial_loss_scale == 16777216.0


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("optimization.epoch=3", "did you mean 'optimization.epochs'"),
        ("epochs=3", "did you mean 'optimization.epochs'"),
        ("optimisation.epochs=3", "did you mean 'optimization.epochs'"),
        ("optimization=3", "no setting is called 'optimization'"),
        ("optimization.epochs", "is no assignment; write section.key=value"),
        ("optimization.epochs=many", "optimization.epochs: got 'many'"),
        ("optimization.epochs=2.5", "optimization.epochs: got '2.5'"),
        ("optimization.epochs=0", "expected greater than or equal to 1"),
        ("optimization.clip_norm=inf", "expected a finite number"),
        ("optimization.averaging_decay=1", "expected less than 1"),
        ("precision.mode=fp8", "expected 'fp32', 'bf16' or 'fp16'"),
        ("precision.initial_loss_scale=3**2", "initial_loss_scale: got '3**2'"),
        ("loss.covariance=-1", "covariance is -1.0"),
        ("guard.gate=perhaps", "guard.gate: got 'perhaps', expected a valid boolean"),
        ("scenes.symbols=some", "expected 'constant' or 'iid'"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(assignment: str, told: str) -> None:
    """A mistyped key or value is refused; the message says what came and what was expected."""
    with pytest.raises(ConfigError) as caught:
        with_overrides(Config(), [assignment])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_weight_at_all_is_refused() -> None:
    """A loss whose every weight is 0 trains nothing and is refused before the run."""
    weights = [f"loss.{field.name}=0" for field in dataclasses.fields(Config().loss)]
    with pytest.raises(ConfigError, match="every loss weight is 0"):
        with_overrides(Config(), weights)


def test_an_unknown_preset_names_the_known_ones() -> None:
    """A mistyped preset is answered with the list of presets."""
    with pytest.raises(ConfigError, match="known are overfit, production, smoke"):
        preset("overfitt")


def test_a_saved_configuration_with_unknown_keys_is_refused() -> None:
    """A configuration of another version is refused by name, not read in part."""
    with pytest.raises(ConfigError, match=r"no setting is called 'scenes.sead'"):
        from_mapping({"scenes": {"sead": 1}})

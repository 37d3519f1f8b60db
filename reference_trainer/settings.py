"""Settings by name: dotted keys, ``key=value`` overrides, and errors that name the nearest key."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from reference_trainer.config import PRESETS, Config
from reference_trainer.errors import ConfigError
from reference_trainer.loss import LossTerms, LossWeights

_ADAPTER = TypeAdapter(Config)


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """One setting: its dotted name, its default and its meaning."""

    name: str
    default: object
    meaning: str


def preset(name: str) -> Config:
    """Return the configuration called ``name``.

    Raises:
        ConfigError: there is no such preset; the message names the known ones.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]


def as_mapping(config: Config) -> dict[str, Any]:
    """Return a configuration as nested plain values; :func:`from_mapping` is its inverse."""
    return asdict(config)


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Build a configuration from nested values; what is left out keeps its default.

    Raises:
        ConfigError: a key is unknown or a value does not fit; the message names the key.
    """
    try:
        return _ADAPTER.validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error


def with_overrides(config: Config, assignments: Iterable[str]) -> Config:
    """Return ``config`` with ``section.key=value`` assignments applied in order.

    Raises:
        ConfigError: an assignment has no ``=``, its key is unknown or its value does not fit.
    """
    values = as_mapping(config)
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        name = name.strip()
        if not equals:
            raise ConfigError(f"{assignment!r} is no assignment; write section.key=value")
        if name not in _DEFAULTS:
            raise ConfigError(_unknown(name))
        section, key = name.split(".")
        values[section][key] = value.strip()
    return from_mapping(values)


def config_keys() -> tuple[ConfigKey, ...]:
    """Return every setting, in the order of the sections."""
    sections = {field.name: getattr(Config(), field.name) for field in fields(Config)}
    return tuple(key for name, group in sections.items() for key in _keys_of(name, group))


_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {6,}\S.*)*)", re.MULTILINE)


def _keys_of(section: str, group: Any) -> Iterator[ConfigKey]:
    weights = isinstance(group, LossWeights)  # one per field of LossTerms, explained there
    meanings = _attribute_meanings(LossTerms if weights else type(group))
    for field in fields(group):
        meaning = f"weight of: {meanings[field.name]}" if weights else meanings[field.name]
        yield ConfigKey(f"{section}.{field.name}", getattr(group, field.name), meaning)


def _attribute_meanings(owner: type) -> dict[str, str]:
    """Read the ``Attributes`` of a Google-style docstring: the code and the help say the same."""
    _, _, listed = (inspect.getdoc(owner) or "").partition("Attributes:\n")
    return {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(listed)}


_DEFAULTS = {key.name: key.default for key in config_keys()}


def _unknown(name: str) -> str:
    last = [known for known in _DEFAULTS if known.endswith("." + name.rpartition(".")[2])]
    near = last or difflib.get_close_matches(name, _DEFAULTS, n=1, cutoff=0.0)
    return f"no setting is called {name!r}; did you mean {near[0]!r}? train --help lists them all"


def _sentence(error: ValidationError) -> str:
    first, *more = error.errors(include_url=False)
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":  # a section's own check: its message is a whole sentence
        return str(first["ctx"]["error"])
    if first["type"] == "unexpected_keyword_argument":
        return _unknown(name)
    reason = first["msg"].replace("Input should be", "expected", 1)
    others = f" ({len(more)} more settings do not fit either)" if more else ""
    return f"setting {name}: got {first['input']!r}, {reason}{others}"

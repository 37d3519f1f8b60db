"""Frozen dataclasses to strict JSON values and back, following their annotations.

JSON has no NaN and no infinity, so a number that is not finite travels as one of the strings of
:data:`NONFINITE_NAMES`. The annotation says where a number is expected, so such a string cannot be
confused with text. Finite numbers come back bit for bit; of a NaN only the fact is kept.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import Any

NONFINITE_NAMES: Mapping[str, float] = MappingProxyType(
    {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
)
"""How numbers that JSON cannot write are written."""


class CodecError(ValueError):
    """A value that does not fit its annotation; ``where`` is its place, such as ``drift.name``."""

    def __init__(self, problem: str, where: str = "") -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.problem = problem
        self.where = where

    def inside(self, name: str) -> CodecError:
        """Return the same error as seen from the value that holds this one under ``name``."""
        dot = "." if self.where and not self.where.startswith("[") else ""
        return CodecError(self.problem, f"{name}{dot}{self.where}")


@dataclass(frozen=True, slots=True)
class Codec:
    """The two directions for one annotation; both raise :class:`CodecError`."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


@cache
def codec_of(annotation: Any) -> Codec:
    """Return the codec of an annotation.

    Known are float, int, str, bool, StrEnum classes, dataclasses, ``X | None``, ``tuple[X, ...]``,
    ``Mapping[str, X]`` and ``object`` (any JSON value; tuples come back as lists).

    Raises:
        TypeError: for any other annotation.
    """
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return _enum_codec(annotation)
    if dataclasses.is_dataclass(annotation):
        return _dataclass_codec(annotation)
    return _container_codec(annotation)


def _container_codec(annotation: Any) -> Codec:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union) and arguments[1:] == (types.NoneType,):
        return _optional_codec(codec_of(arguments[0]))
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return _tuple_codec(codec_of(arguments[0]))
    if origin is Mapping and arguments[0] is str:
        return _mapping_codec(codec_of(arguments[1]))
    raise TypeError(f"no JSON form for a value annotated {annotation}; extend gradguard.codec")


def _mismatch(expected: str, value: object) -> CodecError:
    return CodecError(f"expected {expected}, got {_shown(value)}")


def _shown(value: object) -> str:
    """Show a value without calling a foreign ``repr``, which may be huge or wait for a device."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _mismatch("a number", value)
    try:
        return float(value)
    except OverflowError:
        raise CodecError("the number is too large for 64 bits") from None


def _encode_float(value: object) -> float | str:
    number = _number(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _decode_float(value: object) -> float:
    if isinstance(value, str) and value in NONFINITE_NAMES:
        return NONFINITE_NAMES[value]
    number = _number(value)
    if not math.isfinite(number):  # Python reads 1e999 as Infinity
        raise CodecError("the number is too large for 64 bits")
    return number


def _check_int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _mismatch("an integer", value)
    return value


def _check_str(value: object) -> str:
    if not isinstance(value, str):
        raise _mismatch("a string", value)
    return str(value)


def _check_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise _mismatch("true or false", value)
    return value


def _encode_any(value: object) -> object:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return _encode_float(value)
    if isinstance(value, Mapping):
        return _ANY_MAPPING.encode(value)
    if isinstance(value, (list, tuple)):
        return _ANY_ITEMS.encode(tuple(value))
    raise _mismatch("a number, a string, true, false, None, a list or a mapping", value)


def _enum_codec(members: type[StrEnum]) -> Codec:
    known = {member.value: member for member in members}

    def check(value: object) -> StrEnum:
        if not isinstance(value, str) or value not in known:
            raise _mismatch(f"one of {', '.join(known)}", value)
        return known[value]

    return Codec(lambda value: check(value).value, check)


def _optional_codec(inner: Codec) -> Codec:
    return Codec(
        lambda value: None if value is None else inner.encode(value),
        lambda value: None if value is None else inner.decode(value),
    )


def _tuple_codec(inner: Codec) -> Codec:
    def each(
        convert: Callable[[Any], Any], values: Any, kind: type[list[Any] | tuple[Any, ...]]
    ) -> list[Any]:
        if not isinstance(values, kind):
            raise _mismatch(f"a {kind.__name__}", values)
        converted: list[Any] = []
        for index, value in enumerate(values):
            try:
                converted.append(convert(value))
            except CodecError as error:
                raise error.inside(f"[{index}]") from None
        return converted

    return Codec(
        lambda values: each(inner.encode, values, tuple),
        lambda values: tuple(each(inner.decode, values, list)),
    )


def _mapping_codec(inner: Codec) -> Codec:
    def each(convert: Callable[[Any], Any], mapping: Any) -> dict[str, Any]:
        if not isinstance(mapping, Mapping):
            raise _mismatch("a mapping", mapping)
        converted = {}
        for key, value in mapping.items():
            if not isinstance(key, str):
                raise _mismatch("names that are strings", key)
            try:
                converted[str(key)] = convert(value)
            except CodecError as error:
                raise error.inside(key) from None
        return converted

    return Codec(
        lambda mapping: each(inner.encode, mapping),
        lambda mapping: MappingProxyType(each(inner.decode, mapping)),
    )


def _dataclass_codec(kind: Any) -> Codec:
    hints = typing.get_type_hints(kind)
    codecs = {field.name: codec_of(hints[field.name]) for field in dataclasses.fields(kind)}
    required = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    ]

    def encode(value: Any) -> dict[str, Any]:
        if not isinstance(value, kind):
            raise _mismatch(f"a {kind.__name__}", value)
        return _each_field({name: getattr(value, name) for name in codecs}, encoders)

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _mismatch(f"the fields of a {kind.__name__}", value)
        _check_names(kind.__name__, value, known=codecs, required=required)
        return kind(**_each_field(value, decoders))

    encoders = {name: codec.encode for name, codec in codecs.items()}
    decoders = {name: codec.decode for name, codec in codecs.items()}
    return Codec(encode, decode)


def _each_field(
    values: Mapping[str, Any], converters: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    converted = {}
    for name, value in values.items():
        try:
            converted[name] = converters[name](value)
        except CodecError as error:
            raise error.inside(name) from None
    return converted


def _check_names(
    kind: str, value: Mapping[str, Any], *, known: Mapping[str, Codec], required: list[str]
) -> None:
    unknown = [name for name in value if name not in known]
    if unknown:
        raise CodecError(f"a {kind} has no field {unknown[0]!r}; known are {', '.join(known)}")
    missing = [name for name in required if name not in value]
    if missing:
        raise CodecError(f"a {kind} needs the field {missing[0]!r}")


_SCALARS: Mapping[Any, Codec] = {
    float: Codec(_encode_float, _decode_float),
    int: Codec(_check_int, _check_int),
    str: Codec(_check_str, _check_str),
    bool: Codec(_check_bool, _check_bool),
    object: Codec(_encode_any, lambda value: value),
}
_ANY_MAPPING = _mapping_codec(_SCALARS[object])
_ANY_ITEMS = _tuple_codec(_SCALARS[object])

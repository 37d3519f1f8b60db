"""What ran, when and with which versions: the content of ``run.json``."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from gradguard.codec import CodecError, codec_of
from gradguard.records import SCHEMA_VERSION

FORMAT_NAME = "gradguard-run"
"""Marks a ``run.json`` as ours: other tools write files of that name too."""


class RunMetaError(ValueError):
    """A description of a run that cannot be written or read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMeta:
    """What ran, as ``run.json`` holds it.

    Attributes:
        format: always :data:`FORMAT_NAME`.
        schema: version of the layout of the directory and its records.
        kind: what kind of run it was, such as ``"training"``.
        created_utc: when the directory was made: ISO 8601, UTC.
        versions: version of python, torch and gradguard; None for what is not installed.
        platform: operating system and processor.
        config: the run's configuration as JSON values; numbers that are not finite are strings.
    """

    format: str
    schema: int
    kind: str
    created_utc: str
    versions: Mapping[str, str | None]
    platform: str
    config: Mapping[str, object]


def describe_run(kind: str, config: Mapping[str, object]) -> RunMeta:
    """Return the description of a run that begins now, here, with these versions."""
    return RunMeta(
        format=FORMAT_NAME,
        schema=SCHEMA_VERSION,
        kind=kind,
        created_utc=datetime.now(UTC).isoformat(),
        versions={
            "python": platform.python_version(),
            "torch": _installed("torch"),
            "gradguard": _installed("gradguard"),
        },
        platform=platform.platform(),
        config=config,
    )


def meta_to_json(meta: RunMeta) -> str:
    """Return the text of ``run.json``.

    Raises:
        RunMetaError: for a configuration that holds something without a JSON form.
    """
    try:
        fields = codec_of(RunMeta).encode(meta)
    except CodecError as error:
        raise RunMetaError(f"the description of the run has no JSON form: {error}") from None
    return json.dumps(fields, allow_nan=False, indent=2) + "\n"


def meta_from_json(text: str) -> RunMeta:
    """Read what :func:`meta_to_json` wrote.

    Raises:
        RunMetaError: for text that is not JSON, is of another program or of another version.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunMetaError(f"it is not JSON ({error})") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT_NAME:
        raise RunMetaError("it was not written by gradguard")
    if fields.get("schema") != SCHEMA_VERSION:
        raise RunMetaError(
            f"it has schema {fields.get('schema')!r}, this gradguard reads {SCHEMA_VERSION}; "
            f"use a gradguard of the version that wrote it"
        )
    try:
        meta: RunMeta = codec_of(RunMeta).decode(fields)
    except CodecError as error:
        raise RunMetaError(f"it does not describe a run ({error})") from None
    return meta


def _installed(package: str) -> str | None:
    """Return the version of a package without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None

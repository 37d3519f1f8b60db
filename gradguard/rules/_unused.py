"""Which parameters without a gradient belong to modules that no forward pass has called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from gradguard.evidence import Evidence
from gradguard.records import StepRecord

CONTAINERS = frozenset({"ModuleList", "ModuleDict"})


def uncalled(records: Sequence[StepRecord]) -> frozenset[str]:
    """Return the parameters of modules that were never called, as of the last attempt that knows."""
    for record in reversed(records):
        if record.window is not None and record.window.uncalled is not None:
            return frozenset(record.window.uncalled)
    return frozenset()


def by_place(run: Evidence, names: Collection[str]) -> dict[str, list[str]]:
    """Return the names by the largest module that holds nothing else."""
    every = {n for n, p in run.parameters.items() if p.trainable} | set(names)
    held = Counter(path for name in every for path in _above(name))
    own = Counter(path for name in names for path in _above(name))
    places: dict[str, list[str]] = {}
    for name in names:
        whole = [path for path in _above(name) if own[path] == held[path]]
        direct = name.rpartition(".")[0] or name
        places.setdefault(whole[0] if whole else direct, []).append(name)
    return places


def waiting(run: Evidence, unused: Collection[str]) -> frozenset[str]:
    """Return those that belong to an entry of a list of modules of which another entry was used.

    Experts, heads and layers that are dropped at random are called in some steps only.
    """
    kinds = _kinds(run)
    used = {path for name in run.parameters if name not in unused for path in _above(name)}
    return frozenset(
        name
        for name in unused
        for path, entry in pairwise(_above(name))
        if kinds.get(path) in CONTAINERS and path in used and entry not in used
    )


def _kinds(run: Evidence) -> dict[str, str]:
    return {one.name: one.kind for one in run.setup.modules} if run.setup else {}


def _above(name: str) -> Iterator[str]:
    """Yield the paths of the modules that hold a parameter, the outermost first."""
    parts = name.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        yield ".".join(parts[:depth])

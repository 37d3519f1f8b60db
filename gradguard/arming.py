"""Arms the probes of :mod:`gradguard.explain` for one step when a rule asks where something happened."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn

from gradguard.explain import ArmedProbes
from gradguard.facts import Fact
from gradguard.records import StepRecord
from gradguard.runlog import RunLog

_ARMED = 2
"""How many steps of a run are listened to: each is a few times slower than the others."""

_CONSIDERED = 16
"""How often the rules are asked."""


class Arming:
    """Asks the rules when something looks wrong, and listens to one step for them.

    Args:
        model: the watched one; only a weak reference is kept.
        asks: whether a rule wants to know more about this run.
        add: takes the readings.
    """

    def __init__(
        self, model: nn.Module, *, asks: Callable[[RunLog], bool], add: Callable[[Fact], None]
    ) -> None:
        self._model = weakref.ref(model)
        self._asks, self._add = asks, add
        self._wanted = False
        self._armed = self._considered = 0
        self._probes: ArmedProbes | None = None

    def consider(self, record: StepRecord, log: RunLog) -> None:
        """Ask the rules after a record that they can judge; detailed and broken ones. Sync: none."""
        telling = record.parameters is not None and record.step > 0
        if self._wanted or self._armed >= _ARMED or not (telling or record.nonfinite_tensors):
            return
        if self._considered < _CONSIDERED:
            self._considered += 1
            self._wanted = self._asks(log)

    def begin(self, step: int) -> None:
        """Begin to listen, if a rule asked for it, before the forward of this step. Sync: none."""
        model = self._model()
        if not self._wanted or self._probes is not None or model is None:
            return
        self._wanted = False
        self._armed += 1
        probes = ArmedProbes(model, list(model.named_parameters()), step)
        if probes.start():
            self._probes = probes

    def end(self) -> None:
        """Stop listening and hand on what was found. Sync: reads values on the host, if it listened."""
        probes, self._probes = self._probes, None
        if probes is not None:
            for reading in probes.stop():
                self._add(reading)

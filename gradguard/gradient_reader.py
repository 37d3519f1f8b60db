"""Reads the gradients of one optimizer, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from gradguard.clipping import SharedNorms
from gradguard.draft import Draft
from gradguard.gradient_samples import GradientSamples
from gradguard.norms import NormPlan, nonfinite_counts, norm_plan, planned_norms, zero_tests

_ALERT_STEPS = 32
"""How many steps non-finite entries are counted exactly after a gradient was not finite."""

_SHARED_ERROR = 1e-2
"""How far the norm of a clipping may be from ours: torch's own is off by 3e-4 for ten million values."""

_NAMES = 64
"""How many parameters that never had a gradient one record names."""


class GradientReader:
    """Puts into a draft what the gradients show: norms, samples, zeros, and counts when something is wrong.

    Args:
        parameters: of the optimizer.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._samples = GradientSamples(parameters)
        self._planned: tuple[list[int], NormPlan] | None = None
        self._alert_steps = 0
        self._shared = SharedNorms()
        self._confirmed = False

    @property
    def sampled(self) -> Sequence[int]:
        """Positions of the parameters whose gradients are sampled."""
        return self._samples.chosen

    @property
    def backwards(self) -> int:
        """Backward passes seen since :meth:`reset`, through the parameters that are sampled."""
        return self._samples.backwards

    def listen(self, parameters: Sequence[Tensor]) -> None:
        """Read these parameters from now on."""
        self._planned = None
        self._samples.listen(parameters)

    def read(
        self,
        draft: Draft,
        gradients: Sequence[Tensor | None],
        scale: Tensor | None,
        *,
        sampled: bool = True,
    ) -> None:
        """Read the gradients that a step is about to use. Sync: none.

        Args:
            draft: takes the readings.
            gradients: one per parameter.
            scale: what they are still multiplied by, for a fused optimizer; None for nothing.
            sampled: whether the samples tell anything: a closure makes and clears gradients as often as it is
                called.
        """
        if sampled:
            for key, values in self._samples.readings(gradients, scale).items():
                draft.tensors[f"samples:{key}"] = values
        present = [g for g in gradients if g is not None]
        if not present:
            return
        norms = self._norms(draft, present)
        draft.put("norms", norms if scale is None else norms / scale.to(norms.device))
        if draft.detailed:
            draft.put("paths", zero_tests(present, norms))
        if self._alert_steps:
            draft.put("counts", nonfinite_counts(present))
            self._alert_steps = max(0, self._alert_steps - 1)

    def _norms(self, draft: Draft, present: list[Tensor]) -> Tensor:
        """Return the norms, without a reading where a clipping has just made one."""
        shared = self._shared.take(present)
        if shared is not None and self._confirmed and not (draft.detailed or self._alert_steps):
            return shared
        norms = planned_norms(present, self._norm_plan(draft.with_gradient, present))
        if shared is not None and draft.detailed:
            draft.put("shared_error", _largest_error(shared, norms))
        return norms

    def share(self, norms: SharedNorms) -> None:
        """Take norms from here, once a detailed step has shown that they are right."""
        self._shared = norms

    def confirm(self, shared_error: float) -> None:
        """Go by shared norms only if they were those that were read.

        Args:
            shared_error: largest difference of a shared norm, relative to that of all gradients.
        """
        self._confirmed = shared_error <= _SHARED_ERROR

    def _norm_plan(self, places: list[int], present: list[Tensor]) -> NormPlan:
        """Return how to read the norms, worked out anew when other parameters have a gradient."""
        if self._planned is None or self._planned[0] != places:
            self._planned = places, norm_plan(present)
        return self._planned[1]

    def alert(self, steps: int = _ALERT_STEPS) -> None:
        """Count non-finite entries exactly for some steps."""
        self._alert_steps = max(self._alert_steps, steps)

    def reset(self) -> None:
        """The next window begins."""
        self._samples.reset()

    def close(self) -> None:
        """Remove every hook."""
        self._samples.close()


def _largest_error(shared: Tensor, norms: Tensor) -> Tensor:
    """Return the largest difference over the norm of all; 0 where the same ones are not finite. Sync: none."""
    other = norms.to(shared.dtype)
    whole = torch.linalg.vector_norm(other.nan_to_num(0.0, 0.0))
    difference = torch.where(shared.isfinite() | other.isfinite(), (shared - other).abs(), 0.0)
    tiny = torch.finfo(whole.dtype).tiny
    error: Tensor = difference.nan_to_num(torch.inf).amax() / whole.clamp_min(tiny)
    return error


class GradientCensus:
    """Keeps count of the parameters that never had a gradient."""

    def __init__(self) -> None:
        self._had_gradient: set[str] = set()
        self._all_had_gradient = False

    def take(self, draft: Draft, parameters: Sequence[Tensor]) -> tuple[int, tuple[str, ...]]:
        """Return how many trainable parameters had no gradient in this attempt, and which never had one.

        Args:
            draft: the attempt; its names are those of ``parameters``.
            parameters: of the optimizer.
        """
        missing = len(draft.names) - len(draft.with_gradient)
        if missing == 0:
            self._all_had_gradient = True
            return 0, ()
        # Frozen parameters, experts, or something to report.
        pairs = list(zip(draft.names, parameters, strict=True))
        present = set(draft.with_gradient)
        missing = sum(p.requires_grad and i not in present for i, (_, p) in enumerate(pairs))
        self._had_gradient.update(draft.names[i] for i in draft.with_gradient)
        without = (n for n, p in pairs if p.requires_grad and n not in self._had_gradient)
        return missing, () if self._all_had_gradient else tuple(islice(without, _NAMES))

"""Maximum likelihood as the comparison runs it: for each symbol model the likelihood that is right for it.

With one symbol for all snapshots the symbols are numbers to solve for, and the likelihood is the
conditional one. With a new symbol each snapshot they are many, and each fits noise: there the
unconditional likelihood has the last word, from scratch and from a network alike.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from reference_trainer.likelihood import LikelihoodFit, maximum_likelihood
from reference_trainer.refinement import refine, refine_each
from reference_trainer.unconditional import refine_unconditional

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.physics import ScenePhysics
    from reference_trainer.positions import Positions
    from reference_trainer.residual_search import GridShape
    from reference_trainer.scenes import Scenes

_COMPARED_AFTER = 5
"""Steps of the unconditional likelihood after which the ends from several starts are compared."""


def most_likely_of_all(
    physics: ScenePhysics, scenes: Scenes, num_sources: Tensor, *, grid: GridShape
) -> Positions:
    """Return the most likely positions of ``num_sources``, int64 ``[B]``, from scratch.

    Args and errors: as :func:`reference_trainer.likelihood.maximum_likelihood`. Sync: often.
    """
    found = maximum_likelihood(physics, scenes, num_sources, grid=grid).positions
    return _settled(physics, scenes, found)


def most_likely_from(
    physics: ScenePhysics, scenes: Scenes, start: Positions, *others: Positions
) -> Positions:
    """Return the most likely positions near some starts, of which the best end counts in each scene.

    Which end is best is for the likelihood to say that has the last word. The conditional one chooses on
    the way, so where it has not, every start goes that way alone.

    Args and errors: as :func:`reference_trainer.refinement.refine`. Sync: often.
    """
    if physics.symbols == "constant":
        return refine(physics, scenes, start, *others).positions
    ends = [
        refine_unconditional(physics, scenes, fit.positions, iterations=_COMPARED_AFTER)
        for fit in refine_each(physics, scenes, start, *others)
    ]
    best = reduce(LikelihoodFit.better_of, ends)
    return _settled(physics, scenes, best.positions)


def _settled(physics: ScenePhysics, scenes: Scenes, found: Positions) -> Positions:
    if physics.symbols == "constant":
        return found
    return refine_unconditional(physics, scenes, found).positions

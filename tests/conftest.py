"""Settings of the whole test suite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Two threads are slower than one on small virtual machines, and bits then depend on the machine.
torch.set_num_threads(1)

# Timed assertions do not belong in the suite: a loaded machine is no failure.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu, with the reason, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

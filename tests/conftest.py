"""Settings of all tests: one thread a worker, reproducible property tests, no GPU tests without a GPU.

Not here: fixtures; each folder has its own.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the processors

import pytest
from hypothesis import settings

settings.register_profile("twofold", deadline=None, derandomize=True)
settings.load_profile("twofold")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where torch finds none (torch is imported only if there are such tests)."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))

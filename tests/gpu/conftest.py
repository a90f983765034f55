"""These tests need a GPU; they are skipped only where there is none."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Skip everything in this folder without a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

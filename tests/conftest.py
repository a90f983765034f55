"""Settings of all tests: offline, one thread, no user configuration, no CPU kernels.

Most tests compare bits with those of the reference, or run what belongs to GPUs on a CPU. The
kernels sum in fixed point, or in fp32 in another order; their own tests (test_cpu*.py) use them.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLUTE_CPU_VARIANT"] = "none"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def cpu_kernels(monkeypatch):
    """Switch the CPU kernels on, in fixed point."""
    from flute.cpu import library

    monkeypatch.delenv("FLUTE_CPU_VARIANT", raising=False)
    monkeypatch.delenv("FLUTE_CPU_EXACT", raising=False)
    if library.why_not():
        pytest.skip(library.why_not())

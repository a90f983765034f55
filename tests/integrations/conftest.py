"""What tests of several parts of vLLM share: layers that believe in a rank of several."""

from __future__ import annotations

import pytest


@pytest.fixture
def ranks(monkeypatch):
    """Make vLLM's layers believe in a rank of several; the function returned says which.

    They keep the order of storage, so that tests can look at their codes.
    """
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    monkeypatch.setenv("FLUTE_CPU_VARIANT", "none")

    def be(rank, size):
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        yield be

"""Memory of loading: what is packed, and one dense layer at a time."""

from __future__ import annotations

import gc
import weakref

import torch
from helpers import save_tiny
from transformers import AutoModelForCausalLM

import flute
from flute.integrations.huggingface_quantizer import FluteHfQuantizer
from flute.linear import LutLinear
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint


def test_one_layer_at_a_time_is_dense_while_a_model_is_quantised_on_load(tmp_path, monkeypatch):
    save_tiny(tmp_path / "dense", num_hidden_layers=4)
    quantize, seen, most = FluteHfQuantizer.quantize, [], 0

    def watch(self, weight, name, layer):
        nonlocal most
        gc.collect()
        alive = {ref().data_ptr() for ref in seen if ref() is not None}
        most = max(most, len(alive | {weight.data_ptr()}))
        seen.append(weakref.ref(weight))
        return quantize(self, weight, name, layer)

    monkeypatch.setattr(FluteHfQuantizer, "quantize", watch)
    config = flute.FluteConfig(4, 32, method="nf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert len(seen) == 4 * 7
    assert most <= 2, "the weight being quantised, and at most the one before it"
    assert all("weight" not in dict(m.named_parameters()) for m in lut_layers(model))


def lut_layers(model):
    return [m for m in model.modules() if isinstance(m, LutLinear)]


def test_a_quantised_model_takes_its_files_bytes(tmp_path):
    save_tiny(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "q", QuantizeOptions(3, 32))
    model = flute.from_pretrained(tmp_path / "q")
    on_disk = (tmp_path / "q" / "model.safetensors").stat().st_size
    in_memory = sum(p.numel() * p.element_size() for p in model.parameters())
    assert in_memory <= on_disk
    assert not any(p.device.type == "meta" for p in model.parameters())
    assert all(m.codes.dtype == torch.int32 for m in lut_layers(model))

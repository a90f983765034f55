"""Calibrated quantisation of a checkpoint on disk, a decoder block in memory at a time.

    disk --block i--> Hessians of its layers --> codes, scales, tables --> disk
                      hidden states of the windows through the quantised block --> block i + 1

Blocks that an interrupted run had finished are read back from what it wrote, and only passed
through. Guided weighting loads the whole model once more before; learning end to end keeps it, and
an interrupted run learns again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flute.architecture import meta_model, model_keys
from flute.block_walk import Block, BlockWalk, explain_out_of_memory, find_blocks
from flute.blockwise import quantize_block, quantize_head
from flute.calibration import check_windows
from flute.checkpoint import CheckpointReader, open_safetensors
from flute.dense import output_head
from flute.end_to_end import quantize_end_to_end
from flute.errors import UnsupportedProblemError
from flute.format import QuantizedWeight
from flute.guidance import output_weights
from flute.head_inputs import head_hessian
from flute.model import ModelPlan, QuantizeOptions
from flute.pack import unpack_codes
from flute.reference import dequantize
from flute.training import LearnOptions
from flute.writer import Progress


class CheckpointWalk:
    """Quantises the layers of a checkpoint in the order of its decoder blocks.

    Args:
        reader: the dense checkpoint.
        plan: which layers are quantised, and how.
        layers: name of the weight tensor on disk -> full module name, for the layers quantised.
        options: the method and its table.
        windows: token ids of the calibration text, int64, shape (samples, sequence).
        device: where blocks run and are quantised.
        staging: the folder that finished layers are written to.
        progress: told what a step that ends no layer does.

    Raises:
        CalibrationError: the windows do not fit the model.
        UnsupportedProblemError: a layer is in no decoder block, or the model cannot be loaded block
            by block.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        plan: ModelPlan,
        layers: Mapping[str, str],
        options: QuantizeOptions,
        windows: Tensor,
        device: torch.device,
        staging: Path,
        progress: Progress | None = None,
    ) -> None:
        self._reader, self._plan, self._options = reader, plan, options
        self._windows, self._device, self._staging = windows, device, staging
        self._progress = progress
        self._layer_on_disk = {m: name.removesuffix(".weight") for name, m in layers.items()}
        self._model = meta_model(reader.directory, reader.config)
        self._dtype = reader.dtype(next(iter(layers)))
        keys, _ = model_keys(self._model, reader.names)
        self._on_disk = {key: name for name, key in keys.items()}
        blocks = find_blocks(self._model, list(plan.body))
        self.block_of = {layer: block.index for block in blocks for layer in block.layers}
        """Full module name -> index of its block; a head that has a Hessian is after the last."""
        check_windows(self._model, windows)
        if plan.head_has_hessian:
            self.block_of[plan.head] = len(blocks)
        self._walk: BlockWalk | None = None
        self._next = 0
        self._weights: dict[str, QuantizedWeight] = {}

    def quantized(self, layer: str) -> QuantizedWeight:
        """Return a quantised layer; all layers of earlier blocks must have been written.

        Args:
            layer: full module name; to be asked for in the order of blocks.

        Raises:
            CalibrationError: NaN or Inf in the inputs of a layer, or out of memory.
            FormatError: a weight or a Hessian that cannot be used.
        """
        learn = self._options.learn
        if learn is not None and learn.end_to_end:
            self._weights = self._weights or self._learn_end_to_end(learn)
            return self._weights[layer]
        self._advance_to(self.block_of[layer])
        return self._weights[layer]

    def quantized_head(self) -> Iterator[QuantizedWeight]:
        """Return the output head in blocks of rows; all decoder blocks must have been written.

        Raises:
            CalibrationError: NaN or Inf in its inputs, or out of memory.
            FormatError: a weight or a Hessian that cannot be used.
        """
        head, options = self._plan.head, self._options
        walk = self._advance_to(self.block_of[head])
        self._load_outside(walk.blocks[0])
        hessian = head_hessian(self._model, head, walk, self._windows)
        self._model.to("meta")
        name = f"{self._layer_on_disk[head]}.weight"
        return quantize_head(
            lambda start, stop: self._reader.rows(name, start, stop),
            self._plan.shapes[head],
            *(head, self._plan.config, options.table, hessian),
        )

    def _advance_to(self, target: int) -> BlockWalk:
        """Pass through the blocks up to that of an index, which is quantised; return the walk."""
        self._walk = self._walk or self._start()
        while self._next <= min(target, len(self._walk.blocks) - 1):
            self._pass(self._walk, self._walk.blocks[self._next], target)
            self._next += 1
        return self._walk

    def _start(self) -> BlockWalk:
        """Load what comes before the blocks, take the windows through it, and let it go."""
        model: Any = self._model
        token_weights = None
        if self._options.guided:
            self._load_all()
            token_weights = output_weights(model, self._plan.body, self._windows)
            model.to("meta")
        self._load_outside(find_blocks(model, list(self._plan.body))[0])
        walk = BlockWalk(
            *(model, list(self._plan.body), self._windows, self._device),
            keep_dense=self._options.learn is not None,
            token_weights=token_weights,
            keep_outputs=self._plan.head_has_hessian,
        )
        model.to("meta")
        return walk

    def _load_outside(self, block: Block) -> None:
        """Load what is neither in a decoder block, of which ``block`` is one, nor in the head."""
        prefix, head = block.name.rpartition(".")[0] + ".", output_head(self._model)
        wanted = [
            key
            for key in self._model.state_dict()
            if not key.startswith(prefix)
            and (not head or key.rpartition(".")[0] != head)
            and key in self._on_disk
        ]
        _make_buffers(self._model, self._device)
        self._model.load_state_dict(self._read(wanted), strict=False, assign=True)

    def _load_all(self) -> None:
        """Load the whole dense model.

        Raises:
            CalibrationError: it does not fit into memory.
        """
        model: Any = self._model
        keys = [key for key in model.state_dict() if key in self._on_disk]
        advice = "Leave out what needs all of it (`--guided`, `--learn-end-to-end`)."
        with explain_out_of_memory(f"loading the dense model to {self._device}", advice):
            _make_buffers(model, self._device)
            model.load_state_dict(self._read(keys), strict=False, assign=True)
            if any(p.is_meta for p in model.parameters()):  # a rotated head is on disk by itself
                model.tie_weights()

    def _learn_end_to_end(self, learn: LearnOptions) -> dict[str, QuantizedWeight]:
        progress = self._progress
        self._load_all()
        weights = quantize_end_to_end(
            *(self._model, self._plan.config, list(self._plan.body), self._options.table, learn),
            self._windows,
            guided=self._options.guided,
            report=None if progress is None else lambda text: progress.advance(0, text),
        )
        self._model.to("meta")
        return weights

    def _read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        state = {}
        for key in keys:
            if key not in self._on_disk:
                raise UnsupportedProblemError(
                    f"`{key}` is no tensor of its own in `{self._reader.directory}`, so that the "
                    "model cannot be loaded block by block. Use `flute.quantize_model(model, ..., "
                    "calibration=windows)` on the loaded model."
                )
            tensor = self._reader.tensor(self._on_disk[key]).to(self._device)
            state[key] = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
        return state

    def _pass(self, walk: BlockWalk, block: Block, target: int) -> None:
        """Quantise a block, or read it back if it is before the target; then pass through it."""
        start = len(block.name) + 1
        state = self._read(f"{block.name}.{key}" for key in block.module.state_dict())
        _make_buffers(block.module, self._device)
        block.module.load_state_dict({key[start:]: t for key, t in state.items()}, assign=True)
        dense = {name: state[f"{name}.weight"] for name in block.layers}
        if block.index < target:
            if self._options.learn is not None:
                walk.advance_dense(block)
            self._weights = {name: self._read_back(name) for name in block.layers}
        else:
            options = self._options
            self._weights = quantize_block(
                walk, block, dense, self._plan.config, options.table, options.learn
            )
        for name, weight in self._weights.items():
            block.module.get_parameter(f"{name[start:]}.weight").data.copy_(
                dequantize(weight, self._dtype)
            )
        walk.advance(block)
        block.module.to("meta")

    def _read_back(self, layer: str) -> QuantizedWeight:
        """Return a layer that an interrupted run has written."""
        name, spec = self._layer_on_disk[layer], self._plan.config.spec_of(layer)
        parts = {f"{name}.{part}": part for part in ("codes", "scales", "table")}
        tensors: dict[str, Tensor] = {}
        for path in sorted(self._staging.glob("*.safetensors")):
            with open_safetensors(path) as file:
                for key in parts.keys() & set(file.keys()):
                    tensors[parts[key]] = file.get_tensor(key).to(self._device)
        codes = unpack_codes(tensors["codes"], spec.num_bits, self._plan.shapes[layer][1])
        return QuantizedWeight(codes, tensors["scales"], tensors["table"], spec)


def _make_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers that are on no disk, such as the frequencies of rotary embeddings.

    Raises:
        UnsupportedProblemError: the architecture does not say how.
    """
    initialise = getattr(model, "_init_weights", None)
    for name, module in model.named_modules():
        made = []
        for key in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(key)
            if buffer is not None and buffer.is_meta:
                fill = torch.nan if buffer.is_floating_point() else 0
                module._buffers[key] = torch.full_like(buffer, fill, device=device)
                made.append(key)
        if made and initialise is not None:
            with torch.no_grad():
                initialise(module)
        for key in made:
            value = module._buffers[key]
            if initialise is None or value is None or bool(value.isnan().any()):
                raise UnsupportedProblemError(
                    f"The buffer `{name}.{key}` cannot be made without loading the model. Use "
                    "`flute.quantize_model(model, ..., calibration=windows)` on the loaded model."
                )

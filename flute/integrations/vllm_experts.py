"""vLLM's MoE experts, quantised: a matrix per expert and projection, through the package's op.

    files      <experts>.<e>.<gate | up | down>.{codes, scales, table}
    loaded     w13_* (experts of this rank, gate rows then up rows)    w2_* (..., down rows)
    apply      per expert that is asked for: down(act(gate x) * up x), weighted and summed

It is correct, not fast: products per expert. `flute.integrations.expert_stack` says which.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from flute.concat import concat_weights
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import (
    SCALE_DTYPES,
    TENSOR_NAMES,
    CheckpointConfig,
    PackedWeight,
    QuantSpec,
)
from flute.groups import fit_groups
from flute.integrations.expert_stack import Block, ExpertStack, asked_for, captured
from flute.integrations.vllm_layers import Shard, cut_rows
from flute.integrations.vllm_online import quantize_packed
from flute.integrations.vllm_order import in_kernel_order
from flute.model import QuantizeOptions
from flute.precompile import compile_kernels, prepared_problem

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
_SHARDS = {"w1": "gate", "w3": "up", "w2": "down"}
"""vLLM's name of an expert's projection -> ours."""


class _Stack(NamedTuple):
    """What of a projection of all experts of this rank is no tensor."""

    spec: QuantSpec
    N: int
    table_ends: tuple[int, ...]
    is_ordered: bool


class FluteExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Loads and multiplies the experts of one MoE block.

    Args:
        name: of vLLM's layer.
        config: of the checkpoint, whose experts are quantised.
        moe: vLLM's description of the block.
    """

    def __init__(self, name: str, config: CheckpointConfig, moe: Any) -> None:
        super().__init__(moe)
        self.name, self.config = name, config
        self.scale_dtype = SCALE_DTYPES[config.scale_dtype]
        self.has_row_tables = config.table_scope == "row"
        self._loaded: set[tuple[int, str, str]] = set()
        self._stacks: dict[str, _Stack] = {}

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """Return None: vLLM's own kernels take no part."""
        return

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give a block the parameters that this rank's part of its experts is loaded into.

        Args:
            layer: of vLLM.
            num_experts: of this rank.
            hidden_size: input features of gate and up, output features of down.
            intermediate_size_per_partition: output features of gate and up on this rank.
            params_dtype: dtype of the activations.
            **extra_weight_attrs: vLLM's loader, not used.

        Raises:
            UnsupportedProblemError: the ranks' parts cut a group or a word, or the block is of a
                kind that is not supported.
        """
        self._prepare(
            layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype
        )
        H, inner = self.hidden, self.inner
        rows, down = self.specs["gate"], self.specs["down"]
        whole = Shard(H, rows.num_words(H), rows.num_groups(H))
        shard = cut_rows(f"{self.name}.down", down, inner * self.ranks, self.ranks)
        for stem, N, spec, part in (("w13", 2 * inner, rows, whole), ("w2", H, down, shard)):
            tables = N if self.has_row_tables else (2 if stem == "w13" else 1)
            shapes = {
                "codes": ((N, part.words), torch.int32),
                "scales": ((N, part.groups), self.scale_dtype),
                "table": ((tables, spec.num_entries), torch.float32),
            }
            for key, (shape, dtype) in shapes.items():
                data = torch.empty((num_experts, *shape), dtype=dtype)
                parameter = nn.Parameter(data, requires_grad=False)
                layer.register_parameter(f"{stem}_{key}", parameter)
                set_weight_attrs(parameter, {"weight_loader": self._loader(layer, key)})

    def _prepare(
        self, layer: Any, num_experts: int, hidden: int, inner: int, dtype: torch.dtype
    ) -> None:
        """Remember the block's sizes and how its experts are quantised."""
        activation = getattr(layer.activation, "value", layer.activation)
        if (
            activation not in _ACTIVATIONS
            or layer.apply_router_weight_on_input
            or self.moe.has_bias
        ):
            raise UnsupportedProblemError(
                f"`{self.name}`: quantised experts are supported with {' or '.join(_ACTIVATIONS)}, "
                f"without biases, and with weights on their output; this block has {activation}. "
                "Quantise the model again with its experts skipped: --skip '*.experts.*'."
            )
        self.num_experts, self.hidden, self.inner, self.dtype = num_experts, hidden, inner, dtype
        self.ranks, self.rank = int(self.moe.tp_size), int(self.moe.tp_rank)
        self._act = _ACTIVATIONS[activation]
        self._is_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        self.specs = {
            name: expert_spec(self.config, self.name, projections)
            for name, projections in (("gate", ("gate_proj", "w1")), ("down", ("down_proj", "w2")))
        }

    def _loader(self, layer: Any, key: str) -> Callable[..., bool | None]:
        """Return what loads a tensor of an expert: checks it, and takes this rank's part."""

        def load(
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local != -1:
                self._check(key, shard_id, expert_id, loaded_weight, param.dtype)
                data, part = param.data[local], self._own(key, shard_id, loaded_weight)
                if shard_id != "w2":
                    data = data.chunk(2)[0 if shard_id == "w1" else 1]
                data.copy_(part)
                self._loaded.add((local, shard_id, key))
            return local != -1 if return_success else None

        return load

    def _check(
        self, key: str, shard_id: str, expert: int, loaded: Tensor, dtype: torch.dtype
    ) -> None:
        inner = self.inner * self.ranks
        N, K = (self.hidden, inner) if shard_id == "w2" else (inner, self.hidden)
        spec = self.specs["down" if shard_id == "w2" else "gate"]
        tables = N if self.has_row_tables else 1
        expected = {
            "codes": (N, spec.num_words(K)),
            "scales": (N, spec.num_groups(K)),
            "table": (tables, spec.num_entries),
        }[key]
        if loaded.dtype != dtype or tuple(loaded.shape) != expected:
            raise FormatError(
                f"`{key}` of the {_SHARDS[shard_id]} projection of expert {expert} of "
                f"`{self.name}` is {loaded.dtype} of shape {tuple(loaded.shape)}; expected {dtype} "
                f"of shape {expected} for {spec}. The files and their config.json do not belong "
                "together."
            )

    def _own(self, key: str, shard_id: str, loaded: Tensor) -> Tensor:
        """Return this rank's part of a tensor."""
        if shard_id == "w2":
            shared = key == "table" or loaded.shape[1] == 1
            return loaded if shared else loaded.chunk(self.ranks, dim=1)[self.rank]
        if key == "table" and not self.has_row_tables:
            return loaded
        return loaded.chunk(self.ranks)[self.rank]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the experts into the order that this device's products read.

        Args:
            layer: of vLLM, whose parameters are replaced.

        Raises:
            CheckpointError: a tensor was not in the checkpoint; the message names it.
            KernelCompileError: NVRTC refused a kernel.
        """
        if self._stacks:  # done before
            return
        wanted = [(e, s, k) for e in range(self.num_experts) for s in _SHARDS for k in TENSOR_NAMES]
        missing = [found for found in wanted if found not in self._loaded]
        if missing and not self._is_dummy:
            expert, shard, key = missing[0]
            raise CheckpointError(
                f"The checkpoint lacks `{key}` of the {_SHARDS[shard]} projection of expert "
                f"{expert} of `{self.name}`, whose experts its config.json calls quantised. "
                "Download it again."
            )
        for stem in ("w13", "w2"):
            codes, scales, tables = (getattr(layer, f"{stem}_{key}").data for key in TENSOR_NAMES)
            self._finish(
                layer,
                stem,
                [self._parts(stem, *t) for t in zip(codes, scales, tables, strict=True)],
            )

    def _parts(
        self, stem: str, codes: Tensor, scales: Tensor, tables: Tensor
    ) -> list[PackedWeight]:
        """Return an expert's matrices, as views of what was loaded."""
        if stem == "w2":
            return [
                PackedWeight(codes, scales, tables, self.specs["down"], self.hidden, self.inner)
            ]
        parts = zip(codes.chunk(2), scales.chunk(2), tables.chunk(2), strict=True)
        spec = self.specs["gate"]
        return [PackedWeight(c, s, t, spec, self.inner, self.hidden) for c, s, t in parts]

    def _finish(self, layer: Any, stem: str, experts: Sequence[list[PackedWeight]]) -> None:
        """Give a layer a projection of its experts, stacked, in the order of this device."""
        joined = _with_as_many_tables([concat_weights(parts) for parts in experts])
        ordered = [in_kernel_order(weight, self.dtype) for weight in joined]
        first, out_features = ordered[0]
        is_ordered = out_features is not None
        self._stacks[stem] = _Stack(first.spec, first.N, first.table_ends, is_ordered)
        stacked = zip(*((w.packed, w.scales, w.table) for w, _ in ordered), strict=True)
        for key, tensors in zip(TENSOR_NAMES, stacked, strict=True):
            data = torch.stack(tensors)
            setattr(layer, f"{stem}_{key}", nn.Parameter(data, requires_grad=False))
        if is_ordered and stem == "w13":
            stack, device = self._stack(layer, stem), first.packed.device
            counts = dict.fromkeys(stack.launches(int(self.moe.experts_per_token)))
            weights = [stack.side_by_side(count, first.K) for count in counts]
            problems = [prepared_problem(weight, self.dtype) for weight in weights]
            compile_kernels(problems, device, lambda *_: None)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Return the experts' weighted sum; shared experts are vLLM's own.

        Args:
            layer: of vLLM.
            x: shape (T, H).
            topk_weights: shape (T, top k).
            topk_ids: shape (T, top k), experts of all ranks.
            shared_experts: not used.
            shared_experts_input: not used.

        Returns:
            Shape (T, H), dtype of ``x``.
        """
        local = getattr(layer, "expert_map", None)
        ids = topk_ids if local is None else local[topk_ids.long()]
        block = Block(self._stack(layer, "w13"), self._stack(layer, "w2"), self._act)
        multiply = captured if is_captured(x) else asked_for
        return multiply(block, x, topk_weights, ids)

    def _stack(self, layer: Any, stem: str) -> ExpertStack:
        codes, scales, table = (getattr(layer, f"{stem}_{key}") for key in TENSOR_NAMES)
        return ExpertStack(codes, scales, table, *self._stacks[stem])


def is_captured(x: Tensor) -> bool:
    """Tell whether a CUDA graph records what is done with x."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _with_as_many_tables(weights: Sequence[PackedWeight]) -> list[PackedWeight]:
    """Return weights of one shape with the same number of tables, repeating those of some.

    Joining drops a table that is equal to the one before it, of some experts and not of others.
    """
    most = max(weights, key=lambda weight: len(weight.table))
    return [
        weight
        if len(weight.table) == len(most.table)
        else weight._replace(
            table=weight.table.expand(len(most.table), -1).contiguous(), table_ends=most.table_ends
        )
        for weight in weights
    ]


class FluteOnlineExpertsMethod(FluteExpertsMethod):
    """Quantises the experts of one dense MoE block as soon as vLLM has read them.

    Args:
        name: of vLLM's layer.
        options: what to quantise them to.
        moe: vLLM's description of the block.
    """

    uses_meta_device = True

    def __init__(self, name: str, options: QuantizeOptions, moe: Any) -> None:
        self.options = options
        config = CheckpointConfig(
            options.num_bits, options.group_size, method=options.method, table=options.table_name
        )
        super().__init__(name, config, moe)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give a block the dense weights of this rank, without memory yet; see the base class.

        Raises:
            FormatError: no group divides the rows of a projection.
            UnsupportedProblemError: as the base class.
        """
        H, inner = hidden_size, intermediate_size_per_partition
        self._prepare(layer, num_experts, H, inner, params_dtype)
        dtype = self.options.dtype_of_scales([params_dtype])
        self.config = replace(self.config, scale_dtype=dtype)
        for projection, K in (("gate", H), ("down", inner * self.ranks)):
            name = f"{self.name}.{projection}"
            fitted = fit_groups({name: (1, K)}, self.options.group_size)
            changed = fitted.get(name, {}).get("group_size", self.options.group_size)
            self.specs[projection] = QuantSpec(self.options.num_bits, changed)
        cut_rows(f"{self.name}.down", self.specs["down"], inner * self.ranks, self.ranks)
        for name, N, K in (("w13_weight", 2 * inner, H), ("w2_weight", H, inner)):
            data = torch.empty(num_experts, N, K, dtype=params_dtype, device="meta")
            parameter = nn.Parameter(data, requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, extra_weight_attrs)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantise each expert's projections, and drop the dense weights.

        Args:
            layer: of vLLM.

        Raises:
            FormatError: NaN or Inf; the message names the block.
            KernelCompileError: NVRTC refused a kernel.
        """
        if self._stacks:  # done before
            return
        for stem, projection, count in (("w13", "gate", 2), ("w2", "down", 1)):
            dense = layer.get_parameter(f"{stem}_weight").data
            spec = self.specs[projection]
            config = replace(self.config, num_bits=spec.num_bits, group_size=spec.group_size)
            experts = [
                [quantize_packed(part, self.name, config, self.options) for part in w.chunk(count)]
                for w in dense
            ]
            delattr(layer, f"{stem}_weight")
            self._finish(layer, stem, experts)


def expert_spec(config: CheckpointConfig, name: str, projections: Sequence[str]) -> QuantSpec:
    """Return bits and group size of a projection of a block's experts, all of which are alike.

    Args:
        config: of the checkpoint, in whose overrides blocks may have other names than in vLLM.
        name: of vLLM's layer; its number tells the block.
        projections: the names that the projection may have.
    """
    number = re.search(r"\.(\d+)\.", name)
    block = number.group(1) if number else "0"
    pattern = rf".*\.{block}\..*experts\.\d+\.({'|'.join(projections)})"
    found = next((key for key in config.overrides if re.fullmatch(pattern, key)), "")
    return config.spec_of(found)

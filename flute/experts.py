"""MoE experts, split: a linear layer per expert and projection, where transformers fuses them.

transformers keeps all experts of a block in two tensors, gate_up (E, 2 I, H) and down (E, H, I).
Files of checkpoints, and vLLM, name each expert's three matrices. Split, they are layers like any
other, are quantised as such and stored under their names on disk:

    <experts>.<e>.<gate | up | down>.{codes, scales, table}      e in [0, E)
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from flute.errors import UnsupportedProblemError

PROJECTIONS = {
    "mixtral": ("w1", "w3", "w2"),
    "qwen2_moe": ("gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
}
"""model_type -> names on disk of an expert's gate, up and down projection. Others stay fused."""


class SplitExperts(nn.Module):
    """The experts of a block as linear layers; called as transformers calls its fused experts.

    ``out[t] = sum_j weights[t, j] * down(act(gate(x[t])) * up(x[t]))`` of expert ``index[t, j]``

    Args:
        names: of an expert's gate, up and down projection.
        act_fn: the activation.
        gate_up: shape (E, 2 I, H); the layers' weights are views of it.
        down: shape (E, H, I).
    """

    def __init__(
        self,
        names: tuple[str, str, str],
        act_fn: Callable[[Tensor], Tensor],
        gate_up: Tensor,
        down: Tensor,
    ) -> None:
        super().__init__()
        self.names, self.act_fn, self.num_experts = names, act_fn, gate_up.shape[0]
        for e in range(self.num_experts):
            gate, up = gate_up[e].chunk(2)
            expert = nn.Module()
            for name, weight in zip(names, (gate, up, down[e]), strict=True):
                expert.add_module(name, _linear(weight))
            self.add_module(str(e), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the experts' weighted sum.

        Args:
            hidden_states: shape (T, H).
            top_k_index: shape (T, top k), each token's experts; E stands for none.
            top_k_weights: shape (T, top k), their weights.
        """
        out = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            if e >= self.num_experts:
                continue
            gate, up, down = (self.get_submodule(f"{e}.{name}") for name in self.names)
            tokens, slots = torch.where(top_k_index == e)
            x = hidden_states[tokens]
            y = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[tokens, slots, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out


def split_experts(model: nn.Module) -> list[str]:
    """Split the fused experts of a model whose kind is known; return the blocks' names.

    Args:
        model: of transformers, on any device; changed in place, weights are shared.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in PROJECTIONS:
        return []
    fused = {name: m for name, m in model.named_modules() if _is_fused(m)}
    for name, module in fused.items():
        split = SplitExperts(
            PROJECTIONS[kind], module.act_fn, module.gate_up_proj.data, module.down_proj.data
        )
        model.set_submodule(name, split.train(module.training))
    return list(fused)


def takes_experts(model: nn.Module, planned: Container[str], prefix: str = "") -> bool:
    """Tell whether split experts are among the layers to quantise, which must be all or none.

    Args:
        model: on any device.
        planned: full names of the layers to quantise.
        prefix: put before each name.

    Raises:
        UnsupportedProblemError: some are and some are not.
    """
    experts = [
        prefix + (f"{parent}.{name}" if parent else name)
        for parent, block in model.named_modules()
        if isinstance(block, SplitExperts)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    dense = [name for name in experts if name not in planned]
    if dense and len(dense) < len(experts):
        raise UnsupportedProblemError(
            f"{len(dense)} of {len(experts)} expert matrices would stay dense, such as "
            f"`{dense[0]}`. Quantise all experts, or skip all of them ('*.experts.*')."
        )
    return bool(experts) and not dense


def _is_fused(module: Any) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return False
    gate_up, down = parameters["gate_up_proj"].shape, parameters["down_proj"].shape
    return len(gate_up) == 3 and gate_up == (down[0], 2 * down[2], down[1])


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer

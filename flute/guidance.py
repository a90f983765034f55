"""Guided weighting: how much an error in each layer's output costs the whole model, token by token.

    dense model, a window --> next-token distributions p; a token y drawn from each
    sum_t -log p_t[y_t]  --backward-->  gradient g (tokens, N) at each layer's output
    weight of token t for a group of outputs:  mean over the group of g_t^2

The expected KL divergence that an output error e (tokens, N) causes is, to second order and with
what ties outputs together left out, sum_t sum_n g_tn^2 e_tn^2 / 2. So the Hessian of a group of
outputs becomes sum_t weight_t x_t x_t', and quantising against it lowers the model's loss rather
than the layer's own error. Labels drawn from the model make g^2 the Fisher information of KL, which
needs no labelled text.

Memory: the dense model, the activations of one window that its backward pass needs, and
``4 * groups`` bytes per token and layer for the weights.

Reference: Kim et al. 2025 (GuidedQuant), arXiv 2505.07004, section 3 (labels of the text there).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from flute.block_walk import evaluating, explain_out_of_memory
from flute.calibration import CalibrationError, check_windows
from flute.errors import UnsupportedProblemError

GROUPS = 4
"""Groups of outputs of a layer, each with weights of its own."""


def output_weights(
    model: nn.Module,
    layers: Collection[str],
    windows: Tensor,
    groups: int = GROUPS,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Tensor]:
    """Return how much each token's error counts in each group of a layer's outputs.

    Args:
        model: the dense causal language model, all of it on one device; no gradient is left in it.
        layers: full names of its linear layers.
        windows: token ids of training text, int64, shape (samples, sequence).
        groups: of outputs: consecutive ones, as equal as `torch.tensor_split` makes them.
        seed: of the tokens drawn.
        progress: called with the number of tokens after each window.

    Returns:
        Layer name -> fp32 on the CPU, shape (samples, sequence, groups), nats per squared output.

    Raises:
        CalibrationError: the windows do not fit the model, NaN or Inf in a gradient (the layer is
            named), or out of memory.
        UnsupportedProblemError: a layer that does not see every token once, such as an expert.
    """
    check_windows(model, windows)
    device = next(model.parameters()).device
    shape = (*windows.shape, groups)
    weights = {name: torch.full(shape, torch.nan, device="cpu") for name in layers}
    generator = torch.Generator(device).manual_seed(seed)
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    current = [0]

    def watch(name: str) -> Callable[..., None]:
        def keep(gradient: Tensor) -> None:
            if gradient.shape[:-1] != (1, windows.shape[1]):
                raise UnsupportedProblemError(
                    f"`{name}` gives {tuple(gradient.shape[:-1])} outputs for (1, "
                    f"{windows.shape[1]}) tokens: guided weighting needs layers that see every "
                    "token once. Leave `guided` (`--guided`) out."
                )
            parts = gradient[0].float().square().tensor_split(groups, 1)
            weights[name][current[0]] = torch.stack([p.mean(1) for p in parts], 1).cpu()

        def attach(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            out.register_hook(keep)

        return attach

    trained = [p for p in model.parameters() if p.requires_grad]
    handles = [model.get_submodule(n).register_forward_hook(watch(n)) for n in layers]
    handles.append(
        embedding.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
    )
    advice = "Use shorter samples (`--sequence`), or leave `--guided` out."
    try:
        for p in trained:
            p.requires_grad_(False)
        with (
            evaluating(model),
            torch.enable_grad(),
            explain_out_of_memory("a backward pass through the dense model", advice),
        ):
            for i, window in enumerate(windows):
                current[0] = i
                _sampled_loss(model, window.to(device), generator).backward()
                if progress:
                    progress(windows.shape[1])
    finally:
        for p in trained:
            p.requires_grad_(True)
        for handle in handles:
            handle.remove()
    for name, values in weights.items():
        if not bool(values.isfinite().all()):
            raise CalibrationError(
                f"The loss's gradient at the output of `{name}` is NaN, Inf, or missing: the model "
                "is broken or overflows in this dtype. Leave `guided` (`--guided`) out."
            )
    return weights


def _sampled_loss(model: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Return the sum of -log p of a token drawn at each position of a window (sequence,)."""
    logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()
    with torch.no_grad():
        drawn = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(logits, drawn, reduction="sum")

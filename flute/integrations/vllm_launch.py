"""Programmatic dependent launches of the kernels between our products in vLLM's compiled graphs.

    product --> norm (inductor's) --> product --> ...     each starts before the one in front ends

Our kernels always do that; inductor's norms and activations do it where `FLUTE_VLLM_PDL=1` asks for
it. What makes that safe, and what it gains, is written down in ARCHITECTURE.md ("Dependent launches
in vLLM").
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from typing import Any

import torch
import torch._inductor.config as inductor
from vllm.platforms import current_platform

from flute.launchers import EARLY_DEPENDENTS

ENVIRONMENT = "FLUTE_VLLM_PDL"
OPTION = "triton.enable_pdl"
"""Of inductor's config. vLLM hands it over when it compiles, and its cache's key contains it."""
CHOICES = "inductor_choices_class"
"""The same; a class of heuristics, here that of `flute.integrations.inductor_norms`."""
LOOKED_AT = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Architectures in whose graphs each kernel of inductor's stands behind one that is not, or comes
first, so that it waits before it reads or writes anything. Qwen3's norms of q and k do not."""


def launch_dependently(made: Any, architectures: list[str] | None) -> None:
    """Let inductor's kernels launch dependently if the environment asks for it; never raises.

    Args:
        made: the VllmConfig that is being made; None changes nothing.
        architectures: of the model, as in its config.json.
    """
    asked = os.environ.get(ENVIRONMENT, "")
    if asked not in ("", "0", "1"):
        warnings.warn(
            f"{ENVIRONMENT}={asked} is not heeded; expected 0 (off) or 1 (on).",
            stacklevel=2,
        )
    if made is None or asked == "0" or not _is_possible():
        return
    options = made.compilation_config.inductor_compile_config
    if asked == "1":
        options.setdefault(OPTION, True)
    if options.get(OPTION):
        # Kernels of a draft model, or of adapters, take part in the same chain and were not read.
        alone = made.speculative_config is None and made.lora_config is None
        if not alone or not set(architectures or ()) & set(LOOKED_AT):
            warnings.warn(
                f"{OPTION} is on for a model whose kernels were not looked at (those of "
                f"{', '.join(LOOKED_AT)} were, without speculation or LoRA). If its text is wrong, "
                f"set {ENVIRONMENT}=0.",
                stacklevel=2,
            )
        # In this process and those that vLLM starts; the launchers are made there, later.
        os.environ.setdefault(EARLY_DEPENDENTS, "0")


def _is_possible() -> bool:
    """Tell whether this GPU launches dependently, and inductor knows how to."""
    if not current_platform.is_cuda() or torch.version.hip:
        return False
    found = current_platform.get_device_capability()
    is_new = found is not None and (found.major, found.minor) >= (9, 0)
    return is_new and hasattr(inductor.triton, "enable_pdl")


def take_one_pass(made: Any) -> None:
    """Let norms take one pass where kernels launch dependently; never raises.

    Args:
        made: as for `launch_dependently`, after it.
    """
    options = made.compilation_config.inductor_compile_config if made else {}
    if os.environ.get(ENVIRONMENT) == "0" or not options.get(OPTION) or not _is_possible():
        return
    try:
        norms = import_module("flute.integrations.inductor_norms")
    except ImportError:  # another torch; norms in two passes work too
        return
    if hasattr(inductor, CHOICES):
        options.setdefault(CHOICES, norms.OnePassNorms)

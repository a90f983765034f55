"""Windows of tokens through a model, block by block; the Hessian of each layer's inputs.

    windows (samples, sequence) -> embedding -> block 0 -> block 1 -> ...
                                   sum of x x' of the inputs of each linear layer

A model is walked decoder block by decoder block: the windows' hidden states wait on the CPU between
blocks, so memory holds them, one block, and its layers' Hessians. Knows nothing of methods: whoever
walks quantises a block once its Hessians are known, and what comes out of the block as it is then
is what the next one is calibrated with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flute.calibration import CalibrationError, check_windows
from flute.errors import UnsupportedProblemError


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Args:
        index: its place.
        name: full module name.
        module: the block.
        layers: full names of its linear layers that are calibrated.
    """

    index: int
    name: str
    module: nn.Module
    layers: tuple[str, ...]


def find_blocks(model: nn.Module, layers: Collection[str]) -> list[Block]:
    """Return a model's decoder blocks: the items of the one module list that holds all layers.

    Args:
        model: on any device, "meta" suffices.
        layers: full names of the linear layers that are calibrated.

    Raises:
        UnsupportedProblemError: there is no such list; the message names a layer outside of it.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    counts = {name: sum(layer.startswith(name + ".") for layer in layers) for name in lists}
    best = max(lists, key=lambda name: (counts[name], -len(name)), default=None)
    outside = [name for name in layers if best is None or not name.startswith(best + ".")]
    if best is None or outside:
        raise UnsupportedProblemError(
            f"`{outside[0]}` is in no decoder block of {type(model).__name__}, so it cannot be "
            "calibrated. Skip it (`--skip`), or use a method without calibration (`--method mse`)."
        )
    blocks = []
    for i, (key, module) in enumerate(model.get_submodule(best).named_children()):
        name = f"{best}.{key}"
        inside = tuple(layer for layer in layers if layer.startswith(name + "."))
        blocks.append(Block(i, name, module, inside))
    return blocks


class _LastBlockError(Exception):
    """Ends a pass through the model once every block's arguments are known."""


class BlockWalk:
    """Takes windows through a model's decoder blocks, one block at a time.

    Use: for each of `blocks` in order, `hessians` (not of need), change the block, `advance`. With
    ``keep_dense`` a second stream passes the blocks as they were: `advance_dense` comes first.

    Args:
        model: a transformers model; its embedding, and what computes positions and masks, are on
            ``device`` with their weights. Blocks may be on "meta" until they are used.
        layers: full names of the linear layers that are calibrated.
        windows: int64, shape (samples, sequence).
        device: where blocks run; None: where the model is.
        keep_dense: keep the hidden states of the dense model too.
        token_weights: layer name -> how much each token counts in its Hessian for each group of
            its outputs, fp32, shape (samples, sequence, groups), from `flute.guidance`.
        keep_outputs: keep what the last block gives, for what comes after it.

    Raises:
        CalibrationError: the windows do not fit the model.
        UnsupportedProblemError: a layer in no block, or a model that does more between its blocks
            than to pass hidden states on.
    """

    _token_weights: Mapping[str, Tensor] | None = None

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str],
        windows: Tensor,
        device: torch.device | None = None,
        *,
        keep_dense: bool = False,
        token_weights: Mapping[str, Tensor] | None = None,
        keep_outputs: bool = False,
    ) -> None:
        self.blocks = find_blocks(model, layers)
        self._keep_outputs = keep_outputs
        self._device = device or next(model.parameters()).device
        self._token_weights = token_weights
        check_windows(model, windows)
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._hidden: list[Tensor] = []
        with evaluating(model), _in_block(self._device, windows.shape[1]):
            for window in windows:
                self._record(model, window.unsqueeze(0).to(self._device))
        self._dense = list(self._hidden) if keep_dense else []

    def _record(self, model: nn.Module, ids: Tensor) -> None:
        """Run the model with blocks that return their input; keep what each was called with."""
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def pass_on(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            first.append(hidden)
            if not isinstance(hidden, Tensor) or hidden.shape != first[0].shape:
                raise UnsupportedProblemError(
                    f"{type(model).__name__} does more between its decoder blocks than to pass "
                    "hidden states on. Use a method without calibration (`--method mse`)."
                )
            arguments.append((args, kwargs))
            if len(arguments) == len(self.blocks):
                raise _LastBlockError("the arguments of all blocks are known")
            return hidden

        for block in self.blocks:
            block.module.forward = pass_on
        try:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
        except _LastBlockError:
            self._hidden.append(first[0].cpu())
        finally:
            for block in self.blocks:
                del block.module.forward
        if len(arguments) < len(self.blocks):
            raise UnsupportedProblemError(
                f"{type(model).__name__} used {len(arguments)} of {len(self.blocks)} blocks."
            )
        self._arguments = self._arguments or arguments

    def _run(
        self, block: Block, hidden: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        args, kwargs = self._arguments[block.index]
        with _in_block(self._device, hidden.shape[1]):
            inputs = (hidden.to(self._device), *args)
            out = torch.func.functional_call(block.module, dict(weights or {}), inputs, kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @property
    def num_windows(self) -> int:
        """Windows that are taken through the model."""
        return len(self._hidden)

    def output(self, block: Block, window: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Return what a block makes of a window with other weights, gradients passing to these.

        Args:
            block: the block that the walk is at.
            window: its index.
            weights: full layer name -> weight (N, K), rounded to the dtype of the layer's own.
        """
        start = len(block.name) + 1
        own = {f"{name[start:]}.weight": weight for name, weight in weights.items()}
        dtypes = {key: block.module.get_parameter(key).dtype for key in own}
        cast = {key: weight.to(dtypes[key]) for key, weight in own.items()}
        return self._run(block, self._hidden[window], cast)

    def output_of(self, window: int) -> Tensor:
        """Return what the last block gave for a window, (1, sequence, H), with ``keep_outputs``."""
        return self._hidden[window].to(self._device)

    def target(self, window: int) -> Tensor:
        """Return the dense stream's states of a window, (1, sequence, H), after `advance_dense`."""
        return self._dense[window].to(self._device)

    @torch.no_grad()
    def advance_dense(self, block: Block) -> None:
        """Take the dense stream through a block, which must still be as the dense model has it."""
        with evaluating(block.module):
            for i, hidden in enumerate(self._dense):
                self._dense[i] = self._run(block, hidden).cpu()

    @torch.no_grad()
    def hessians(self, block: Block) -> dict[str, Tensor]:
        """Return the sum of x x' over the inputs of each of a block's layers, fp32, shape (K, K).

        Layers that read one tensor (q, k, v; gate, up) share one Hessian. With token weights it is
        the sum of weight x x', shape (groups of outputs, K, K), of each layer for itself.

        Raises:
            CalibrationError: NaN or Inf in the inputs of a layer; it is named.
        """
        leaders: dict[str, str] = {}
        sums: dict[str, Tensor] = {}
        inputs: list[tuple[Tensor, str]] = []
        window = 0

        def collect(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0]
                if name not in leaders:
                    seen = () if self._token_weights else inputs
                    leaders[name] = next((known for other, known in seen if other is x), name)
                    inputs.append((x, leaders[name]))
                if leaders[name] != name:
                    return
                rows = x.detach().reshape(1, -1, x.shape[-1]).float()
                if self._token_weights:
                    weights = self._token_weights[name][window].to(rows.device)
                    rows = rows * weights.T.sqrt().unsqueeze(2)
                if name not in sums:
                    sums[name] = rows.new_zeros(len(rows), rows.shape[2], rows.shape[2])
                sums[name].baddbmm_(rows.mT, rows)

            return hook

        layers = {
            name: block.module.get_submodule(name[len(block.name) + 1 :]) for name in block.layers
        }
        hooks = [layer.register_forward_pre_hook(collect(name)) for name, layer in layers.items()]
        try:
            with evaluating(block.module):
                for hidden in self._hidden:
                    self._run(block, hidden)
                    inputs.clear()
                    window += 1
        finally:
            for handle in hooks:
                handle.remove()
        for name, total in sums.items():
            if not all(bool(torch.isfinite(end)) for end in total.aminmax()):
                raise CalibrationError(
                    f"`{name}` is given NaN or Inf by the calibration text: the weights before it "
                    "are broken, or overflow in this dtype."
                )
        for name, layer in layers.items():  # an expert that no token reached
            if name not in leaders:
                K = int(layer.get_parameter("weight").shape[1])
                leaders[name] = name
                sums[name] = torch.zeros(1, K, K, device=self._device, dtype=torch.float32)
        whole = {name: total if self._token_weights else total[0] for name, total in sums.items()}
        return {name: whole[leaders[name]] for name in block.layers}

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Take the windows through a block as it is now, to the input of the next."""
        if block.index + 1 == len(self.blocks) and not self._keep_outputs:
            self._hidden.clear()
            self._dense.clear()
        with evaluating(block.module):
            for i, hidden in enumerate(self._hidden):
                self._hidden[i] = self._run(block, hidden).cpu()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and afterwards back to how each module was."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextlib.contextmanager
def explain_out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Turn a device's or the host's refusal of memory into one that says what needs less.

    Args:
        what: was being done.
        advice: the option that lowers it.

    Raises:
        CalibrationError: memory was refused.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_host = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not is_host and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise CalibrationError(f"Out of memory in {what}. {advice}") from error


def _in_block(device: torch.device, sequence: int) -> contextlib.AbstractContextManager[None]:
    other = "" if device.type == "cpu" else ", or `--device cpu`"
    return explain_out_of_memory(
        f"a decoder block on {device} with {sequence} tokens at a time",
        f"Use shorter samples (`--sequence`){other}.",
    )

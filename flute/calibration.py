"""Calibration: from text to windows of tokens, from those to the Hessian of each layer's inputs.

    text -> windows (samples, sequence) -> embedding -> block 0 -> block 1 -> ...
                                              sum of x x' of the inputs of each linear layer

A model is walked decoder block by decoder block: the windows' hidden states wait on the CPU between
blocks, so memory holds them, one block, and its layers' Hessians. Knows nothing of methods: whoever
walks quantises a block once its Hessians are known, and what comes out of the block as it is then
is what the next one is calibrated with.
"""

from __future__ import annotations

import contextlib
import json
import lzma
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flute.errors import FluteError, UnsupportedProblemError

SAMPLES, SEQUENCE = 128, 512
"""Windows, and tokens in each, unless told otherwise."""
_CHARACTERS = 8
"""A piece of text holds this many characters per token of a window; English has about four."""
_SUFFIXES = (".txt", ".text", ".md", ".utf8", ".xz", ".jsonl", ".json")


class CalibrationError(FluteError, ValueError):
    """A text, tokenizer or model that calibration cannot work with."""


def read_documents(source: str | Path) -> list[str]:
    """Return the documents of a text file, or of all text files in a folder.

    A file is one document; .jsonl is one per line and .json a list of them, each a string or an
    object with a "text". Any of them may be compressed (.xz).

    Args:
        source: the file, of any name unless it is JSON, or a folder: its files of known suffixes.

    Raises:
        CalibrationError: nothing there, or it cannot be read as UTF-8 text or JSON.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _SUFFIXES)
        if not files:
            raise CalibrationError(f"`{source}` holds no text: expected {', '.join(_SUFFIXES)}.")
        return [text for file in files for text in read_documents(file)]
    if not path.is_file():
        raise CalibrationError(f"`{source}` does not exist; expected a text file or a folder.")
    try:
        content = path.read_bytes()
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")
        kind = Path(path.stem).suffix if path.suffix == ".xz" else path.suffix
        if kind == ".jsonl":
            return [_text_of(json.loads(line)) for line in text.splitlines() if line.strip()]
        if kind == ".json":
            return [_text_of(entry) for entry in json.loads(text)]
    except (OSError, ValueError, TypeError, KeyError, lzma.LZMAError) as error:
        raise CalibrationError(
            f"`{source}` cannot be read ({type(error).__name__}: {error}); expected UTF-8 text, or "
            'JSON of strings or objects with a "text".'
        ) from error
    return [text]


def _text_of(entry: Any) -> str:
    text = entry if isinstance(entry, str) else entry["text"]
    if not isinstance(text, str):
        raise TypeError(f'"text" is {type(text).__name__}')
    return text


def sample_windows(
    documents: Collection[str],
    tokenizer: Any,
    samples: int = SAMPLES,
    sequence: int = SEQUENCE,
    seed: int = 0,
) -> Tensor:
    """Tokenise random pieces of text and pack them into windows, each opened by the BOS token.

    Documents are cut into pieces, the pieces shuffled, tokenised one after the other without
    special tokens and joined, until there are enough. So only as much is tokenised as is used.

    Args:
        documents: from `read_documents`.
        tokenizer: a transformers tokenizer; without a BOS token windows have none.
        samples: windows wanted.
        sequence: tokens per window, the BOS token included.
        seed: of the shuffle.

    Returns:
        int64, shape (samples, sequence), on the CPU.

    Raises:
        CalibrationError: too little text, or it tokenises to nothing.
    """
    if samples < 1 or sequence < 2:
        raise CalibrationError(
            f"`samples` is {samples} and `sequence` is {sequence}; expected at least 1 and 2."
        )
    length = _CHARACTERS * sequence
    pieces = [text[i : i + length] for text in documents for i in range(0, len(text), length)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    needed = samples * (sequence - len(bos))
    ids: list[int] = []
    for i in order:
        ids += tokenizer(pieces[i], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= needed:
            break
    if not ids:
        raise CalibrationError(
            f"The calibration text ({sum(map(len, documents))} characters) tokenises to nothing. "
            "Give another text."
        )
    if len(ids) < needed:
        raise CalibrationError(
            f"The calibration text has {len(ids)} tokens; {samples} samples of {sequence} take "
            f"{needed}. Give more text, or fewer or shorter samples (`--samples`, `--sequence`)."
        )
    body = torch.tensor(ids[:needed], dtype=torch.int64, device="cpu").view(samples, -1)
    start = torch.tensor(bos, dtype=torch.int64, device="cpu").expand(samples, -1)
    return torch.cat((start, body), 1)


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


def check_windows(model: nn.Module, windows: Tensor) -> None:
    """Check that windows of tokens fit a model.

    Args:
        model: a transformers model; what its config does not say is not checked.
        windows: int64, shape (samples, sequence), from `sample_windows`.

    Raises:
        CalibrationError: not int64 (samples, sequence), longer than the model's context, or a token
            beyond its vocabulary.
    """
    if windows.ndim != 2 or windows.dtype != torch.int64 or not windows.numel():
        raise CalibrationError(
            f"`calibration` is {windows.dtype} of shape {tuple(windows.shape)}; expected int64 "
            "token ids (samples, sequence), from `flute.calibration.sample_windows`."
        )
    config: Any = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None)
    if context and windows.shape[1] > context:
        raise CalibrationError(
            f"Calibration windows have {windows.shape[1]} tokens; the model's context is "
            f"{context}. Use shorter ones (`--sequence`)."
        )
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary and int(windows.max()) >= vocabulary:
        raise CalibrationError(
            f"The tokenizer gives id {int(windows.max())}; the model knows {vocabulary} tokens."
        )


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

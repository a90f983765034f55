"""Time and memory of loading a model of a real model's shapes: packed, or quantised on the way.

Writes shards of random tensors (a file per layer, all with one layer's random bytes), then loads
them in a process of its own. Loading should need no more memory of the device than the packed
model, one layer, and what is dense; of the host no more than one shard.

    python benchmarks/bench_load.py --shape llama-3-70b --layers 16          # quantised shards
    python benchmarks/bench_load.py --shape llama-3-70b --layers 8 --dense   # quantised on loading
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from serving_models import (
    GROUP_SIZE,
    SHAPES,
    VARIANTS,
    linear_shapes,
    llama_config,
    quantization_config,
)

from flute.format import QuantSpec


def layer_tensors(shape: str, variant: str) -> dict[str, torch.Tensor]:
    """Return one decoder layer's tensors, by name after ``model.layers.N.``, on the CPU."""
    maker = "cuda" if torch.cuda.is_available() else "cpu"
    s = SHAPES[shape]
    tensors = {
        f"{name}.weight": torch.ones(s["h"], dtype=torch.float16)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    for name, (N, K) in linear_shapes(shape).items():
        if variant == "fp16":
            tensors[f"{name}.weight"] = torch.randn(N, K, device=maker).mul_(0.02).half().cpu()
            continue
        spec = QuantSpec(VARIANTS[variant], GROUP_SIZE)
        shape_of_words = (N, spec.num_words(K))
        words = torch.randint(0, 2**31 - 1, shape_of_words, dtype=torch.int32, device=maker)
        tensors[f"{name}.codes"] = words.cpu()
        tensors[f"{name}.scales"] = torch.rand(N, spec.num_groups(K)).half()
        tensors[f"{name}.table"] = torch.randn(1, spec.num_entries)
    return tensors


def write_shards(folder: Path, shape: str, layers: int, variant: str) -> tuple[int, int]:
    """Write a checkpoint; return its bytes and those of a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    s = SHAPES[shape]
    one = layer_tensors(shape, variant)
    size = sum(t.numel() * t.element_size() for t in one.values())
    ends = {
        "model.embed_tokens.weight": torch.ones(s["v"], s["h"], dtype=torch.float16),
        "model.norm.weight": torch.ones(s["h"], dtype=torch.float16),
        "lm_head.weight": torch.ones(s["v"], s["h"], dtype=torch.float16),
    }
    shards = [{f"model.layers.{i}.{name}": t for name, t in one.items()} for i in range(layers)]
    index: dict[str, str] = {}
    total = 0
    for i, shard in enumerate([ends, *shards]):
        file = f"model-{i:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
        total += sum(t.numel() * t.element_size() for t in shard.values())
    config = llama_config(shape, layers).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    if (quantised := quantization_config(variant)) is not None:
        config["quantization_config"] = quantised
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total, size


def load(folder: Path, bits: int, device: str) -> dict[str, float | None]:
    """Load here and return seconds, bytes of the parameters, and peaks of memory."""
    import flute

    is_dense = "quantization_config" not in json.loads((folder / "config.json").read_text())
    config = flute.FluteConfig(bits, GROUP_SIZE, method="nf") if is_dense else None
    extra = {} if config is None else {"quantization_config": config}
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    with _AnonymousMemory() as host:
        start = time.perf_counter()
        model = flute.from_pretrained(folder, dtype=torch.float16, device_map=device, **extra)
        if on_gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "seconds": round(took, 2),
        "parameter_bytes": size,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak_host_bytes": host.peak - host.before,
    }


class _AnonymousMemory(threading.Thread):
    """The most memory of this process that no file backs, looked at every 10 ms."""

    def __enter__(self) -> _AnonymousMemory:
        self.peak = self.before = self._now()
        self._stop_now = threading.Event()
        self.daemon = True
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_now.set()
        self.join()

    def run(self) -> None:
        while not self._stop_now.wait(0.01):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="llama-3-70b", choices=list(SHAPES))
    add("--layers", type=int, help="keep only so many of its layers")
    add("--bits", type=int, default=4)
    add("--dense", action="store_true", help="write fp16 shards and quantise them while loading")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--work", type=Path, default=Path("load-work"), help="where shards are written")
    add("--out", type=Path, help="a JSON file to write")
    add("--load-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_only:
        print(json.dumps(load(args.work, args.bits, args.device)))
        return
    layers = args.layers or SHAPES[args.shape]["l"]
    variant = "fp16" if args.dense else f"w{args.bits}"
    start = time.perf_counter()
    total, layer = write_shards(args.work, args.shape, layers, variant)
    print(f"shards written in {time.perf_counter() - start:.1f} s", flush=True)
    command = [sys.executable, __file__, "--load-only", "--work", str(args.work)]
    command += ["--bits", str(args.bits), "--device", args.device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    result = json.loads(done.stdout.splitlines()[-1])
    record = {"shape": args.shape, "layers": layers, "bits": args.bits, "dense": args.dense}
    record |= {"file_bytes": total, "layer_file_bytes": layer, **result}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record |= {"gpu": gpu, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    print(json.dumps(record), flush=True)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Rate of a merge, compared with a copy of the same files that also computes a checksum.

    python -m tests.bench.merge [GIGABYTES] [REPEATS] [FOLDER]

Defaults: 8 GB, 3 repeats, a temporary folder. The bf16 model has random weights in the shapes of an
8B Llama; the adapter has r 64 on all seven projections. Copy and merge alternate, so that the page
cache is in the same state for both. Each ends when its files are on the disk. The copy reads a file
in chunks, hashes them (SHA-256) and writes them, in one thread.
"""

import hashlib
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.adapter.merge import merge_adapters
from pipeline.adapter.merge_plan import MergeOptions, WeightedAdapter
from pipeline.model.checkpoint_names import model_on_meta

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, R = 4096, 14336, 32, 8, 64
CHUNK_BYTES = 2**24
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
VOCABULARY = 32000


def make_base(folder, num_bytes):
    """Save a model of about this size: one shard for each decoder layer, and one for the rest.

    All layers have the same random values. Returns the number of layers.
    """
    folder.mkdir()
    block = {
        name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in SHAPES.items()
    }
    norms = {name: torch.ones(HIDDEN, dtype=torch.bfloat16) for name in ("input", "post_attention")}
    layers = max(1, num_bytes // sum(tensor.nbytes for tensor in block.values()))
    weight_map = {}

    def save_shard(index, tensors):
        name = f"model-{index:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": tensor for name, tensor in block.items()}
        tensors |= {f"{prefix}{name}_layernorm.weight": tensor for name, tensor in norms.items()}
        save_shard(layer, tensors)
    outside_layers = {
        "model.embed_tokens.weight": torch.zeros(VOCABULARY, HIDDEN, dtype=torch.bfloat16),
        "model.norm.weight": norms["input"],
    }
    save_shard(layers, outside_layers)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
        "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def make_adapter(folder, layers):
    """A random adapter of all projections."""
    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for name, (d_out, d_in) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(R, d_in) * 0.01
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, R) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 2 * R, "target_modules": [*SHAPES]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def copy_with_checksum(base, out):
    """Copy all weights, hash them, and sync them to the disk.

    Nothing reads the hash: the copy computes with every byte only because a merge does so too.
    """
    out.mkdir()
    for path in sorted(base.glob("*.safetensors")):
        digest = hashlib.sha256()
        with path.open("rb") as source, (out / path.name).open("wb") as target:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())


def main():
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 8.0
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    folder = Path(tempfile.mkdtemp(dir=sys.argv[3] if len(sys.argv) > 3 else None))
    try:
        layers = make_base(folder / "base", int(gigabytes * 1e9))
        make_adapter(folder / "adapter", layers)
        model_on_meta(folder / "base")  # imports the model's class, which is not part of the rate
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        if shutil.disk_usage(folder).free < 1.1 * size:
            sys.exit(f"{folder}: not enough room for a second model of {size / 1e9:.1f} GB")
        print(f"{size / 1e9:.2f} GB in {layers + 1} shards, r {R}, {os.cpu_count()} cores")
        work = {
            "copy": lambda out: copy_with_checksum(folder / "base", out),
            "merge": lambda out: merge_adapters(
                folder / "base", [WeightedAdapter(folder / "adapter")], out, MergeOptions()
            ),
        }
        rates = {name: [] for name in work}
        for repeat in range(repeats):
            for name, run in work.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                run(folder / "out")
                seconds = time.perf_counter() - start
                cpu_seconds = time.process_time() - cpu_start
                shutil.rmtree(folder / "out")
                rates[name].append(size / 1e6 / seconds)
                load = os.getloadavg()[0]
                print(
                    f"{repeat + 1} {name:<6} {rates[name][-1]:7.0f} MB/s, {seconds:6.1f} s, "
                    f"{cpu_seconds:6.1f} s of CPU, load {load:.1f}",
                    flush=True,
                )
        ratios = [merge / copy for copy, merge in zip(rates["copy"], rates["merge"], strict=True)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            f"merge / copy: median {statistics.median(ratios):.2f}, "
            f"{min(ratios):.2f} to {max(ratios):.2f}; peak memory {peak / 1e9:.2f} GB"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

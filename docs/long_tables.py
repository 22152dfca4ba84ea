"""The table of longest lengths in docs/long.md, from the plan's predictions."""

from dataclasses import replace

from pipeline.config.settings import RunSettings
from pipeline.plan.choose import Cluster
from pipeline.plan.given.catalogue import gpu_named
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.published import published_shape
from pipeline.plan.length import longest_length

_MODELS = (
    "Qwen/Qwen2.5-1.5B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.3-70B-Instruct",
)
_GPUS = ("rtx-4090-24gb", "a100-40gb", "h100-80gb", "h200-141gb")
_COUNTS = (1, 8)
_HOST_GIB = 128  # host memory for each GPU
_HEAD = "| model | base |" + "".join(f" {n} x {gpu} |" for gpu in _GPUS for n in _COUNTS)
_BEGIN, _END = "<!-- longest -->\n", "<!-- end of longest -->"


def with_tables(page: str) -> str:
    """The page with the table between its markers as the code makes it now."""
    before, rest = page.split(_BEGIN)
    return f"{before}{_BEGIN}{_table()}\n{_END}{rest.split(_END)[1]}"


def _table() -> str:
    lines = [_HEAD, "|---|---|" + "--:|" * (len(_GPUS) * len(_COUNTS))]
    for model in _MODELS:
        for base, in_4_bits in (("16 bits", False), ("4 bits", True)):
            cells = [_cell(model, gpu, n, in_4_bits) for gpu in _GPUS for n in _COUNTS]
            lines.append(f"| {model.split('/')[1]} | {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(model: str, gpu: str, count: int, in_4_bits: bool) -> str:
    """The longest length in thousands of tokens; -: none fits."""
    settings = RunSettings(
        model=model, train_data="train.jsonl", output_dir="run", lora_r=16,
        load_in_4bit=in_4_bits, global_batch_size=8,
    )  # fmt: skip
    hardware = replace(gpu_named(gpu), host_bytes=count * _HOST_GIB * GIB)
    cluster = Cluster(hardware=hardware, nodes=1, ranks_per_node=count)
    longest = longest_length(settings, published_shape(model), cluster)
    return "-" if longest is None else f"{longest.max_length // 1000:,}"

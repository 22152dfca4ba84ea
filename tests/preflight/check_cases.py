"""GOOD and BAD: for each check of preflight, probe results that pass and that do not.

A case has the name of the check, its results by rank, in BAD the expected level, and words that the
message must have.
"""

from pipeline.plan.given.hardware import GIB
from tests.plans import H100S

_VERSIONS = {
    "python": "3.12.1", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0",
    "peft": "0.21.2", "bitsandbytes": "0.50.2",
}  # fmt: skip
_CPU_RANK = {"gpus": [], "visible": 0, "unallocated_gpus": None, "requests_no_gpu": False}
_VISIBLE, _INVISIBLE = ({"is_visible": value, "folder": "/r"} for value in (True, False))
_FOREIGN = {"unallocated_gpus": {"used": "[5]", "allocated": "X=0,1"}}
_TORCH = {"torch": "2.13.0", "cuda": "13.0", "nccl": "2.28"}


def gpu(uuid: str, **changes) -> dict:
    """Result of a rank with one H100."""
    card = {
        "uuid": uuid, "name": H100S.name, "driver": "580.65", "cuda": 13000,
        "capability": [9, 0], "total": H100S.device_bytes, "free": H100S.device_bytes,
        "processes": [],
    }  # fmt: skip
    return {
        "gpus": [card | changes],
        "visible": 1,
        "unallocated_gpus": None,
        "requests_no_gpu": False,
    }


def network(**changes) -> dict:
    """Result of the network probe on a node."""
    return {
        "master": "node1", "interface": "eth0", "mbit": 100_000, "missing": {}, "infiniband": {},
        "is_cuda": True,
    } | changes  # fmt: skip


def ranked(node: int) -> dict:
    """Result of a rank on a node."""
    return {"launcher": "torchrun", "node": node}


def memory(need: int, free: int, total: int, limited_by: str = "") -> dict:
    """Host memory of a node, in GiB."""
    sizes = {"need": need, "free": free, "total": total}
    return {name: size * GIB for name, size in sizes.items()} | {"limited_by": limited_by}


def product(*tflops: float, kind: str = "cuda") -> dict:
    """Result of a rank whose devices have these rates."""
    return {
        "kind": kind, "rates": [rate * 1e12 for rate in tflops], "planned": 690e12,
        "dtype": "float32", "fp32_rate": None, "has_fp32_kernels": False,
    }  # fmt: skip


def cpu_product(bf16: float, fp32: float, *, has_fp32_kernels: bool) -> dict:
    """Result of a CPU rank with these rates in TFLOPS, for a run in bf16."""
    rates = {"dtype": "bfloat16", "fp32_rate": fp32 * 1e12, "has_fp32_kernels": has_fp32_kernels}
    return product(bf16, kind="cpu") | rates


def summed(gb_s: float, kind: str = "cuda") -> dict:
    """Result of an all-reduce."""
    return {"kind": kind, "rate": gb_s * 1e9, "planned": 300e9}


def links(
    slow: tuple[int, ...] = (), *, far: bool = False, planned: float | None = None
) -> dict[int, dict]:
    """Results of eight ranks, each linked to the next; slow ranks have a tenth of the rate.

    `far`: ranks 3 and 4 are on different nodes, and `planned` is the planned rate between them.
    """
    result: dict[int, dict] = {rank: {} for rank in range(8)}
    for rank in range(7):
        partner, is_local = rank + 1, not (far and rank == 3)
        rate = 300e9 if is_local else 25e9
        if rank in slow or partner in slow:
            rate /= 10
        link = {"rate": rate, "is_local": is_local, "planned": None if is_local else planned}
        result[rank][str(partner)] = result[partner][str(rank)] = link
    return result


GOOD = [
    ("settings", {0: {"lr": "0.1"}, 1: {"lr": "0.1"}}, ["the same"]),
    ("ranks", {0: ranked(0), 1: ranked(1)}, ["2 ranks on node1, node2 (torchrun)"]),
    ("versions", {0: _VERSIONS, 1: _VERSIONS}, ["torch 2.13.0"]),
    ("port", {0: "29500 is free"}, ["29500"]),
    ("network", {0: network(), 1: network(mbit=0)}, ["node1", "eth0", "100,000 Mb/s"]),
    ("network", {0: network(interface=None, mbit=0), 1: network()}, ["eth0"]),
    ("network", {0: network(master="", interface=None), 1: network(master="", interface=None)},
        ["known after the rendezvous"]),
    ("network", {0: network(mbit=1000, infiniband={"mlx5_0:1": "ACTIVE"})}, ["1 active"]),
    ("gpus", {0: gpu("GPU-a"), 1: gpu("GPU-b")}, ["2 x NVIDIA H100"]),
    ("gpus", {0: _CPU_RANK}, ["CPU"]),
    ("drivers", {0: gpu("GPU-a"), 1: gpu("GPU-b")}, ["driver 580.65", "CUDA up to 13.0", "9.0"]),
    ("plan", {0: {"a": "1"}, 1: {"a": "1"}}, ["ZeRO-2", "2 x NVIDIA H100"]),
    ("gpu memory", {0: gpu("GPU-a"), 1: gpu("GPU-b")}, ["79.6 GiB"]),
    ("host memory", {0: memory(8, 100, 200)}, ["100.0 GiB"]),
    ("shared memory", {0: 64 * GIB}, ["64.0 GiB"]),
    ("shared memory", {0: None, 1: 64 * GIB}, ["64.0 GiB"]),
    ("model", {0: {"files": 4, "bytes": 16 * GIB}}, ["4 weight files, 16.0 GiB"]),
    ("base", {0: {"base": "a" * 64}, 1: {"base": "a" * 64}}, ["a" * 16]),
    ("disk", {0: {"free": 50 * GIB, "need": GIB, "merged": 16 * GIB}}, ["50.0 GiB free"]),
    ("clock", {0: 0.0, 1: -0.4}, ["less than 2 s"]),
    ("run folder", {0: _VISIBLE, 1: _VISIBLE}, ["/r: written by rank 0, read by all"]),
    ("prepared data", {0: {}, 1: {}}, ["not prepared yet"]),
    ("prepared data", {0: {"train": "ab"}, 1: {"train": "ab"}}, ["train ab"]),
    ("tokenizer", {0: {"tokens": 128256, "has_template": True}}, ["128,256 tokens, with"]),
    ("rows", {0: {"all_rows_parsed": True, "documents": 9, "supervised_tokens": 9}}, ["every row"]),
    ("libraries", {0: _TORCH}, ["NCCL 2.28"]),
    ("4 bits", {0: {"errors": [0.0728], "data_type": "nf4"}}, ["0.0728"]),
    ("4 bits", {0: {"errors": [0.0966], "data_type": "fp4"}}, ["0.0966"]),
    ("matrix product", {0: product(650), 1: product(640)}, ["645 TFLOPS", "690"]),
    ("matrix product", {0: product(0.02, kind="cpu"), 1: product(0.03, kind="cpu")}, ["690"]),
    ("matrix product", {0: cpu_product(0.1, 0.2, has_fp32_kernels=True)}, ["0.1 TFLOPS"]),
    ("matrix product", {0: cpu_product(0.2, 0.1, has_fp32_kernels=False)}, ["0.2 TFLOPS"]),
    ("process group", {0: "nccl", 1: "nccl"}, ["2 ranks over nccl"]),
    ("all-reduce", {0: summed(280), 1: summed(290)}, ["280 GB/s"]),
    ("all-reduce", {0: summed(0.2, "cpu")}, ["0.2 GB/s"]),
    ("all-to-all", {0: {"size": 1}, 1: {"size": 1}}, ["sequence_parallel_size: 1"]),
    ("all-to-all", {0: {"size": 2} | summed(280)}, ["groups of 2 ranks", "280 GB/s"]),
    ("links", links(), ["300 GB/s"]),
    ("links", links(far=True), ["300 GB/s", "25 GB/s"]),
]  # fmt: skip

BAD = [
    ("settings", {0: {"lr": "0.1"}, 1: {"lr": "0.2"}}, "fail", ["lr", "0.2", "rank 1 (node2)"]),
    ("settings", {0: {"lr": "0.1", "seed": "1"}, 1: {"lr": "0.1"}}, "fail", ["seed", "node2"]),
    ("ranks", {0: ranked(0), 1: ranked(0)}, "fail", ["0", "node1, node2"]),
    ("versions", {0: _VERSIONS, 1: _VERSIONS | {"torch": "2.14.0"}}, "fail", ["2.14.0", "node2"]),
    ("network", {0: network(missing={"NCCL_SOCKET_IFNAME": "ib7"})}, "fail", ["ib7", "node1"]),
    ("network", {0: network(master="127.0.0.1")}, "fail", ["MASTER_ADDR"]),
    ("network", {1: network(interface=None, mbit=0)}, "fail", ["node2", "own loopback"]),
    ("network", {1: network(mbit=1000)}, "warn", ["node2", "1,000 Mb/s"]),
    ("network", {0: network(infiniband={"a:1": "ACTIVE", "b:1": "DOWN"})}, "warn", ["b:1"]),
    ("gpus", {0: gpu("GPU-a"), 1: gpu("GPU-a")}, "fail", ["GPU-a", "ranks 0-1"]),
    ("gpus", {0: gpu("GPU-a"), 1: gpu("GPU-b") | _FOREIGN}, "fail",
        ["rank 1 (node2) uses GPU [5]", "X=0,1"]),
    ("gpus", {0: gpu("GPU-a"), 1: gpu("GPU-b") | {"requests_no_gpu": True}}, "warn",
        ["rank 1 (node2)", "requested no GPU"]),
    ("gpus", {0: gpu("GPU-a") | {"visible": 8}, 1: gpu("GPU-b") | {"visible": 8}}, "warn",
        ["ranks 0-1", "8 GPUs are visible", "torchrun --module pipeline.cli.train"]),
    ("gpus", {0: gpu("GPU-a"), 1: gpu("GPU-b", name="H100 PCIe")}, "warn", ["PCIe", "node2"]),
    ("drivers", {0: gpu("GPU-a"), 1: gpu("GPU-b", driver="550.1")}, "warn", ["550.1", "580.65"]),
    ("plan", {0: {"micro": "1"}, 1: {"micro": "2"}}, "fail", ["micro", "rank 1"]),
    ("gpu memory", {0: gpu("GPU-a"), 1: gpu("GPU-b", free=GIB, processes=[77])}, "fail",
        ["rank 1 (node2): 1.0 GiB of 79.6 GiB free", "77"]),
    ("host memory", {0: memory(8, 4, 200)}, "warn", ["node1: 4.0 GiB of 200.0 GiB free", "8.0"]),
    ("host memory", {1: memory(8, 4, 6, "--mem")}, "fail", ["node2", "--mem", "8.0 GiB"]),
    ("shared memory", {0: 64 * 2**20, 1: 64 * GIB}, "warn", ["node1", "64.0 MiB"]),
    ("base", {0: {"base": "a"}, 1: {"base": "b"}}, "fail", ["node2"]),
    ("disk", {0: {"free": 5 * GIB, "need": GIB, "merged": 16 * GIB}}, "warn", ["merging"]),
    ("clock", {0: 0.0, 1: 7.0}, "warn", ["rank 1 (node2)", "7 s"]),
    ("clock", {0: 0.0, 1: -90.0}, "fail", ["rank 1 (node2)", "90 s"]),
    ("run folder", {0: _VISIBLE, 1: _INVISIBLE}, "fail", ["rank 1 (node2)", "/r"]),
    ("prepared data", {0: {"train": "ab"}, 1: {"train": "cd"}}, "fail", ["cd", "node2"]),
    ("prepared data", {0: {"train": "ab"}, 1: {}}, "fail", ["train", "node2"]),
    ("rows", {0: {"all_rows_parsed": False, "documents": 0, "supervised_tokens": 0}}, "warn",
        ["too many rows"]),
    ("libraries", {0: _TORCH, 1: _TORCH | {"nccl": "2.27"}}, "fail", ["2.27", "rank 1"]),
    ("4 bits",
        {0: {"errors": [0.0728], "data_type": "nf4"}, 1: {"errors": [0.8], "data_type": "nf4"}},
        "fail", ["rank 1", "0.8"]),
    ("4 bits", {0: {"errors": [0.0728, float("nan")], "data_type": "nf4"}}, "fail", ["nan"]),
    ("matrix product", {0: product(650), 1: product(640, 300), 2: product(650)}, "warn",
        ["rank 1 (node2)", "300", "645"]),
    ("matrix product", {0: product(100), 1: product(100)}, "warn", ["100 TFLOPS", "690"]),
    ("matrix product", {0: cpu_product(0.1, 0.2, has_fp32_kernels=False)}, "warn",
        ["0.1 TFLOPS in bf16", "0.2 in fp32", "bf16: false"]),
    ("matrix product", {0: cpu_product(0.2, 0.1, has_fp32_kernels=True)}, "warn",
        ["0.1 in fp32", "fast_paths: false"]),
    ("all-reduce", {0: summed(20), 1: summed(21)}, "warn", ["20 GB/s", "300"]),
    (
        "all-to-all",
        {0: {"size": 2} | summed(280), 1: {"size": 2} | summed(20)},
        "warn",
        ["groups of 2 ranks", "20 GB/s", "300"],
    ),
    ("links", links(slow=(5,)), "warn", ["rank 5 ", "4-5", "5-6"]),
    ("links", links(far=True, planned=60e9), "warn", ["ranks 3-4 ", "3-4 25 of 60 GB/s"]),
    ("links", links(slow=(0,)), "warn", ["ranks 0-1 ", "0-1 30 of 300 GB/s"]),
    ("links", links(slow=(5,), far=True), "warn", ["rank 5 "]),
]  # fmt: skip

# These checks fail only by an error that the probe raises, which test_checks.py tests separately.
WITHOUT_BAD_RESULTS = {"port", "model", "tokenizer", "process group"}

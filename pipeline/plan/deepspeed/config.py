"""The DeepSpeed config of a plan; ds_config.json in the run folder is exactly this.

Each key has its reason in a comment; facts are of DeepSpeed 0.19.8.
"""

from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.gathers import gathers
from pipeline.plan.cost.memory import bucket_elements
from pipeline.plan.given.adapter_counts import adapter_counts
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape

_EXPERTS = {
    "mixtral": "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "qwen2_moe": "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "qwen3_moe": "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
}


def deepspeed_config(
    shape: ModelShape,
    settings: RunSettings,
    layout: Layout,
    *,
    is_cuda: bool,
) -> dict[str, Any]:
    """The config for `deepspeed.initialize`; `train_batch_size` follows from the world size."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation_steps,
        "gradient_clipping": settings.max_grad_norm,  # the default is 1.0, so 0 must be written
        "steps_per_print": None,  # progress is ours
        "optimizer": _optimizer(settings, is_cuda=is_cuda),
        "zero_optimization": _zero(shape, settings, layout, is_cuda=is_cuda),
    }
    if layout.training_dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        # The adapter is small: adding its gradients over ranks in fp32 costs next to nothing.
        config["communication_data_type"] = "fp32"
        if layout.zero_stage > 1:  # at stage 1 this key switches to another optimizer class
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if layout.training_dtype == "float16":
        # hysteresis 1: the default of 2 ignores the first overflow, and that step is lost
        config["fp16"] = {
            "enabled": True,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 1,
        }
    return config


def _optimizer(settings: RunSettings, *, is_cuda: bool) -> dict[str, Any]:
    params: dict[str, Any] = {
        "lr": settings.lr,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": settings.weight_decay,  # DeepSpeed's and torch's defaults differ
        "torch_adam": True,  # DeepSpeed's own Adam is compiled at start-up, even on a CPU
    }
    if is_cuda:
        params["fused"] = True
    return {"type": "AdamW", "params": params}


def _zero(
    shape: ModelShape, settings: RunSettings, layout: Layout, *, is_cuda: bool
) -> dict[str, Any]:
    bucket = bucket_elements(shape, settings)
    zero: dict[str, Any] = {
        "stage": layout.zero_stage,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,  # allocated in full: the default of 5e8 is a gigabyte
        "allgather_bucket_size": bucket,
        # At stages 1 and 2 it costs one more bucket, has given wrong gradients, and gains nothing
        # for an adapter. At stage 3 it overlaps the gathers of the base.
        "overlap_comm": layout.is_sharded,
    }
    if layout.is_sharded:
        zero |= _sharded(shape, settings, layout, is_cuda=is_cuda)
    return zero


def _sharded(
    shape: ModelShape, settings: RunSettings, layout: Layout, *, is_cuda: bool
) -> dict[str, Any]:
    gathered = gathers(shape, settings)
    zero: dict[str, Any] = {
        # Adapters stay whole on every rank: no gathers of small matrices in every layer.
        "stage3_param_persistence_threshold": adapter_counts(shape, settings).largest_matrix,
        # Gathered at most: the block in use, one prefetched, the head (plan/cost/gathers.py).
        "stage3_max_live_parameters": gathered.block,
        "stage3_prefetch_bucket_size": gathered.block,
        "stage3_max_reuse_distance": gathered.reuse_distance,
        # One collective a matrix, into its own memory. Otherwise prefetched matrices share a buffer
        # that is copied from, and that stays allocated until the last copy is used.
        "stage3_allgather_sequential": True,
        # Never wanted: it gathers the whole base on rank 0.
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if shape.model_type in _EXPERTS:
        # Ranks route to different experts, so that the block is gathered as one, in the same order
        # on all. DeepSpeed's default includes these; explicit, in case a later default does not.
        zero["leaf_module"] = {"classes": [_EXPERTS[shape.model_type]]}
    if layout.hpz_partition_size > 1:
        # A second copy of the base over the ranks of a node: gathers stay inside the node.
        zero["zero_hpz_partition_size"] = layout.hpz_partition_size
    if layout.offload_param == "cpu":
        # Shards of the base are in host memory, pinned if there is a GPU to copy to.
        zero["offload_param"] = {"device": "cpu", "pin_memory": is_cuda}
    return zero

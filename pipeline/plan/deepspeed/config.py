"""The DeepSpeed config of a plan, which a run writes to ds_config.json.

Comments give the reason for each key; facts about DeepSpeed hold for version 0.19.8.
"""

from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.gathers import gathers, persistence_threshold
from pipeline.plan.cost.memory import bucket_elements
from pipeline.plan.given.adapter_counts import adapter_counts
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape

# model_type -> class of the module that contains a block's router and experts.
_EXPERT_MODULES = {
    "mixtral": "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "qwen2_moe": "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "qwen3_moe": "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
}
# peft's class for experts with an adapter.
_ADAPTED_EXPERTS = "peft.tuners.lora.layer.ParamWrapper"


def deepspeed_config(
    shape: ModelShape,
    settings: RunSettings,
    layout: Layout,
    *,
    is_cuda: bool,
) -> dict[str, Any]:
    """The config for `deepspeed.initialize`.

    `train_batch_size` is left out, because DeepSpeed computes it from the world size.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation_steps,
        "gradient_clipping": settings.max_grad_norm,  # written even if 0: the default is 1.0
        "steps_per_print": None,  # this package logs the progress itself
        "optimizer": _optimizer_block(settings, is_cuda=is_cuda),
        "zero_optimization": _zero_block(shape, settings, layout, is_cuda=is_cuda),
    }
    if layout.training_dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        # The adapter is small, so reducing its gradients in fp32 costs little.
        config["communication_data_type"] = "fp32"
        if layout.zero_stage > 1:  # at stage 1 this key selects another optimizer class
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if layout.training_dtype == "float16":
        # hysteresis 1: with the default 2, the first overflow does not lower the scale
        config["fp16"] = {
            "enabled": True,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 1,
        }
    return config


def _optimizer_block(settings: RunSettings, *, is_cuda: bool) -> dict[str, Any]:
    """The block `optimizer`."""
    params: dict[str, Any] = {
        "lr": settings.lr,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": settings.weight_decay,  # always written: DeepSpeed's default is not torch's
        "torch_adam": True,  # DeepSpeed's own Adam would be compiled at start-up, even on a CPU
    }
    if is_cuda:
        params["fused"] = True
    return {"type": "AdamW", "params": params}


def _zero_block(
    shape: ModelShape, settings: RunSettings, layout: Layout, *, is_cuda: bool
) -> dict[str, Any]:
    """The block `zero_optimization`."""
    bucket = bucket_elements(shape, settings)
    zero: dict[str, Any] = {
        "stage": layout.zero_stage,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,  # allocated in full: the default of 5e8 takes a gigabyte
        "allgather_bucket_size": bucket,
        # Overlap at stages 1 and 2 costs one more bucket, has given wrong gradients, and gains
        # nothing for an adapter. At stage 3 the gathers of the base overlap with computing.
        "overlap_comm": layout.is_sharded,
    }
    if layout.is_sharded:
        zero |= _zero3_keys(shape, settings, layout, is_cuda=is_cuda)
    return zero


def _zero3_keys(
    shape: ModelShape, settings: RunSettings, layout: Layout, *, is_cuda: bool
) -> dict[str, Any]:
    """The keys of `zero_optimization` that only ZeRO-3 has."""
    gathered = gathers(shape, settings)
    zero: dict[str, Any] = {
        # Adapters of linear layers are replicated, so that no layer gathers its small matrices.
        "stage3_param_persistence_threshold": persistence_threshold(shape, settings),
        # These limits allow the block in use and one prefetched block (plan/cost/gathers.py).
        "stage3_max_live_parameters": gathered.block,
        "stage3_prefetch_bucket_size": gathered.block,
        "stage3_max_reuse_distance": gathered.reuse_distance,
        # Gather each matrix with its own collective into its own memory. Otherwise prefetched
        # matrices share a buffer, which stays allocated until the last of them has been used.
        "stage3_allgather_sequential": True,
        # False, because it would gather the whole base on rank 0.
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    # Ranks route tokens to different experts, but must gather parameters in the same order. A "leaf
    # module" is gathered as a whole, so the order does not depend on routing. DeepSpeed's default
    # list has these classes. They are named here in case a later default does not.
    leaves = [_EXPERT_MODULES[shape.model_type]] if shape.model_type in _EXPERT_MODULES else []
    if adapter_counts(shape, settings).adapted_experts:
        # peft reads experts and adapter before it calls the module that holds the experts.
        leaves.append(_ADAPTED_EXPERTS)
    if leaves:
        zero["leaf_module"] = {"classes": leaves}
    if layout.hpz_partition_size > 1:
        # A second copy of the base, sharded over the ranks of a node: gathers use only its links.
        zero["zero_hpz_partition_size"] = layout.hpz_partition_size
    if layout.offload_param == "cpu":
        # The base's shards stay in host memory; pinned memory makes copies to a GPU faster.
        zero["offload_param"] = {"device": "cpu", "pin_memory": is_cuda}
    return zero

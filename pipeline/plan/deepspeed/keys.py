"""The keys that DeepSpeed 0.19.8 reads. At the top level it silently ignores all others.

tests/plan/deepspeed/test_overlay.py compares these lists with the installed DeepSpeed.
"""

from collections.abc import Collection, Mapping

TOP_LEVEL = frozenset({
    "activation_checkpointing", "aio", "autotuning", "bf16", "checkpoint", "comet",
    "comms_logger", "communication_data_type", "compile", "csv_monitor", "data_efficiency",
    "data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather",
    "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation",
    "memory_breakdown", "optimizer", "pipeline", "prescale_gradients", "scheduler",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "steps_per_print",
    "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size",
    "wall_clock_breakdown", "wandb", "weight_quantization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
})  # fmt: skip

ZERO_OPTIMIZATION = frozenset({
    "allgather_bucket_size", "allgather_partitions", "compute_grad_norm", "contiguous_gradients",
    "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint",
    "enable_sanity_checks", "ignore_unused_parameters", "leaf_module", "legacy_stage1",
    "load_from_fp32_weights", "log_trace_cache_warnings", "memory_efficient_linear",
    "offload_optimizer", "offload_param", "overlap_comm", "override_module_apply",
    "parameter_alignment", "pipeline_loading_checkpoint", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage",
    "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
    "use_multi_rank_bucket_allreduce", "zenflow", "zero_hpz_partition_size",
    "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
})  # fmt: skip

# Name of a ZeRO-3 key without `stage3_` -> its full name. DeepSpeed accepts both names.
SHORT_NAMES: Mapping[str, str] = {
    key.removeprefix("stage3_"): key
    for key in sorted(ZERO_OPTIMIZATION)
    if key.startswith("stage3_") and key != "stage3_gather_fp16_weights_on_model_save"
}

# Keys that DeepSpeed 0.19 removed and refuses with an error -> the remedy that rules/deepspeed.py
# names.
REMOVED = {
    "amp": "set bf16 or fp16 in the run file",
    "compression_training": "set load_in_4bit or load_in_8bit in the run file to save memory",
    "curriculum_learning": "leave it out; the order of the data is a function of the seed",
    "eigenvalue": "leave it out",
    "elasticity": "leave it out; a checkpoint of this project resumes on any number of ranks",
    "graph_harvesting": "leave it out",
    "nebula": "leave it out; checkpoints are this project's own",
    "progressive_layer_drop": "leave it out",
    "quantize_training": "set load_in_4bit or load_in_8bit in the run file",
    "sparse_attention": "leave it out",
    "sparse_gradients": "leave it out; embeddings are frozen",
}
REMOVED_FROM_ZERO = {
    "mics_hierarchical_params_gather": "set hpz_partition_size in the run file",
    "mics_shard_size": "set hpz_partition_size in the run file",
    "zeropp_loco_param": "leave it out",
}

# Path of a block, such as ("zero_optimization", "offload_param") -> its known keys. The keys of
# blocks that are not listed here are not checked.
BLOCKS: Mapping[tuple[str, ...], Collection[str]] = {
    (): TOP_LEVEL | REMOVED.keys(),
    ("zero_optimization",): ZERO_OPTIMIZATION | SHORT_NAMES.keys() | REMOVED_FROM_ZERO.keys(),
    ("zero_optimization", "offload_param"): {
        "buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory",
    },
    ("zero_optimization", "offload_optimizer"): {
        "buffer_count", "cpuadam_cores_perc", "device", "fast_init", "nvme_path", "pin_memory",
        "pipeline_read", "pipeline_write", "ratio", "super_offload",
    },
    ("zero_optimization", "leaf_module"): {"classes", "name_suffixes", "names"},
    ("bf16",): {
        "bf16_master_weights_and_grads", "bf16_optimizer_states", "check_grad_overflow", "enabled",
        "immediate_grad_update",
    },
    ("fp16",): {
        "auto_cast", "consecutive_hysteresis", "enabled", "fp16_master_weights_and_grads",
        "hysteresis", "initial_scale_power", "loss_scale", "loss_scale_window", "min_loss_scale",
    },
    ("data_types",): {"buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"},
    ("activation_checkpointing",): {
        "contiguous_memory_optimization", "cpu_checkpointing", "number_checkpoints",
        "partition_activations", "profile", "synchronize_checkpoint_boundary",
    },
    ("comet",): {
        "api_key", "enabled", "experiment_key", "experiment_name", "mode", "online", "project",
        "samples_log_interval", "workspace",
    },
    ("comms_logger",): {"debug", "enabled", "prof_all", "prof_ops", "verbose"},
    ("csv_monitor",): {"enabled", "job_name", "output_path"},
    ("flops_profiler",): {
        "detailed", "enabled", "module_depth", "output_file", "profile_step",
        "recompute_fwd_factor", "top_modules",
    },
    ("tensorboard",): {"enabled", "job_name", "output_path"},
    ("wandb",): {"enabled", "group", "project", "team"},
    ("optimizer",): {"legacy_fusion", "params", "type"},
    # Keys of AdamW; the rule optimizer-parameters refuses the ones that change a step or checkpoint
    ("optimizer", "params"): {
        "adam_w_mode", "amsgrad", "betas", "bias_correction", "capturable", "differentiable", "eps",
        "foreach", "fp32_optimizer_states", "fused", "lr", "maximize", "torch_adam", "weight_decay",
    },
}  # fmt: skip

# The tables below have the type of value that DeepSpeed accepts for a key path. DeepSpeed would
# check the values only after the model is loaded. overlay.py checks them before a GPU is used, and
# its message names the line. The tables list only keys that the generated config does not set: for
# the others, a user's value must have the type of the generated value.
_ZERO_NUMBERS = {  # keys of zero_optimization with a number as value
    "allgather_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold", "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "sub_group_size",
    "zero_hpz_partition_size",
}  # fmt: skip
_ZERO_OTHERS = {  # keys of zero_optimization with neither a number nor true or false as value
    "leaf_module", "offload_optimizer", "offload_param", "reduce_bucket_size", "stage", "zenflow",
}  # fmt: skip
FLAGS = frozenset({
    *((key,) for key in (
        "dataloader_drop_last", "disable_allgather", "disable_python_gc", "dump_state",
        "memory_breakdown", "prescale_gradients", "wall_clock_breakdown",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    )),
    *(("zero_optimization", key) for key in ZERO_OPTIMIZATION - _ZERO_NUMBERS - _ZERO_OTHERS),
    *(("bf16", key) for key in BLOCKS["bf16",]),
    ("fp16", "auto_cast"), ("fp16", "consecutive_hysteresis"), ("fp16", "enabled"),
    ("fp16", "fp16_master_weights_and_grads"), ("zero_optimization", "offload_param", "pin_memory"),
    ("comet", "online"), ("flops_profiler", "detailed"),
    *((block, "enabled") for block in
      ("comet", "comms_logger", "csv_monitor", "flops_profiler", "tensorboard", "wandb")),
    *(("comms_logger", key) for key in ("debug", "prof_all", "verbose")),
    *(("activation_checkpointing", key) for key in
      BLOCKS["activation_checkpointing",] if key != "number_checkpoints"),
})  # fmt: skip
TEXTS = frozenset({
    *((block, key) for block in ("csv_monitor", "tensorboard", "wandb", "comet")
      for key in BLOCKS[block,] if key not in ("enabled", "online", "samples_log_interval")),
    ("flops_profiler", "output_file"),
})  # fmt: skip
LISTS = frozenset({("comms_logger", "prof_ops")})
# Keys whose values are whole numbers -> the smallest value.
WHOLE_NUMBERS: Mapping[tuple[str, ...], int] = {
    ("steps_per_print",): 1,
    ("zero_optimization", "reduce_bucket_size"): 1,
    **{("zero_optimization", key): 0 for key in _ZERO_NUMBERS},
    **{
        ("zero_optimization", "offload_param", key): 0
        for key in ("buffer_count", "buffer_size", "max_in_cpu")
    },
    ("activation_checkpointing", "number_checkpoints"): 1,
    ("comet", "samples_log_interval"): 1,
    ("flops_profiler", "module_depth"): -1,
    ("flops_profiler", "profile_step"): 1,
    ("flops_profiler", "top_modules"): 1,
    ("fp16", "hysteresis"): 0,
    ("fp16", "initial_scale_power"): 0,
    ("fp16", "loss_scale_window"): 0,
}
CHOICES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("communication_data_type",): ("fp16", "bf16", "fp32"),
    ("data_types", "grad_accum_dtype"): ("fp16", "bf16", "fp32"),
}

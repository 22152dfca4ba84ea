"""Advice for options and values of other training programs that a run file does not have.

The programs are axolotl, LLaMA-Factory, TRL with transformers, ms-swift, and torchtune. ADVICE has
the options without a setting of the same meaning; VALUES has other spellings of a setting's values.
An option with the meaning of a setting, such as `learning_rate` for `lr`, is not listed here: it is
in the trait `peers` of the setting (traits.py).
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from pipeline.commands import DOCS, command
from pipeline.config.settings import settings_by_trait

_TRACKER = "trackers: a list of wandb, tensorboard, mlflow or trackio"
_VARIABLES = "trackers: [wandb]; WANDB_* environment variables set its other options"
_OTHER_TRACKER = "not supported; trackers: a list of wandb, tensorboard, mlflow or trackio"
_NO_HUB = f"training uploads nothing; {command('publish')} uploads the adapter or the merged model"
_ADAMW = (
    "AdamW in fp32 is the only optimizer: an adapter's optimizer states are small, so 8-bit or "
    "paged ones would save little; remove it"
)
_BETAS = "set betas and eps in optimizer.params of a deepspeed_json; the defaults are AdamW's"
_UNSUPPORTED = f"not supported; {DOCS}/adapters.md has the options of the LoRA adapter"
_NOT_NESTED = "keys are not nested: lora_r, lora_alpha, lr and so on, each in a line of its own"
_LOFTQ = "init_lora_weights: loftq, with load_in_4bit: true"
_NEW_TOKENS = (
    "new_tokens adds tokens, which are not special, and trains their rows of embeddings and head"
)
_ONLY_LORA = "LoRA is always trained; QLoRA is load_in_4bit: true"
_NO_FSDP = "sharding is DeepSpeed's ZeRO: zero_stage, chosen by the plan"
_DETECTED_FORMAT = "the format of each row is detected; data_format and columns override that"
_NO_EVAL_BATCH = "evaluation uses batch_size"
_HOLD_OUT = "eval_data: 0.05 holds out 5 % of train_data, eval_data: 200 holds out 200 rows"
_TEMPLATE = "the model's own chat template and end of turn are used; see chat_template"
_LAUNCHER = "not needed: the launcher sets the number of ranks; remove it"
_CHECKPOINTING = "not needed: the plan chooses re-entrant or not; remove it"
_LOSS = "not supported: the loss is the cross-entropy of the supervised tokens; remove it"
_EVAL_TYPE = "not needed: evaluation runs in the training data type; remove it"
_EVAL_PACKING = "held-out documents are packed as the training documents are; remove it"
_WORKERS = "not needed: token ids are memory-mapped and read by a thread; remove it"
_FROZEN = "not needed: the base is frozen, only the adapter is trained; remove it"
_SHAPE = "not supported: config.json of the model decides it"
_PROGRESS = "logging_steps: N for the terminal; metrics.jsonl has every step"
_DEVICE = "not needed: NVIDIA GPUs are used, or the CPU of a machine without a GPU; remove it"
_WEIGHTS = "weight: 0 in a message excludes it from the loss"
_KERNELS = (
    "not supported; faster computations of RankZero are on by default (fast_paths in "
    f"{DOCS}/speed.md); remove it"
)

# Pattern of option names -> advice. The first matching pattern applies.
ADVICE: Mapping[str, str] = {
    "adapter": _ONLY_LORA,
    "finetuning_type": _ONLY_LORA,
    "train_type": _ONLY_LORA,
    "tuner_type": _ONLY_LORA,
    "use_peft": _ONLY_LORA,
    "task_type": _ONLY_LORA,
    "stage": "supervised fine-tuning is the only kind of training",
    "rlhf_type": "supervised fine-tuning is the only kind of training",
    "rl": "supervised fine-tuning is the only kind of training",
    "do_train": f"{command('train')} always trains; remove it",
    "do_eval": "the held-out loss is measured if eval_data is set; remove it",
    "do_predict": f"{command('score')} generates answers after training; remove it",
    "padding_free": "packing: true has no padding; without it there is little, because rows of "
    "about equal length share a micro-batch",
    "quantization_bit": "load_in_4bit: true or load_in_8bit: true",
    "quant_bits": "load_in_4bit: true or load_in_8bit: true",
    "quantization_method": "load_in_4bit: true or load_in_8bit: true; both are bitsandbytes",
    "quant_method": "load_in_4bit: true or load_in_8bit: true; both are bitsandbytes",
    "torch_dtype": "bf16: true, fp16: true, or both false for fp32",
    "dtype": "bf16: true, fp16: true, or both false for fp32",
    "mixed_precision": "bf16: true, fp16: true, or both false for fp32",
    "pure_bf16": "bf16: true; the adapter keeps fp32 masters",
    "tf32": "not supported: matrix products run in the training data type; remove it",
    "attn_implementation": "use_flash_attention: true for FlashAttention-2, else PyTorch's own",
    "attn_impl": "use_flash_attention: true for FlashAttention-2, else PyTorch's own",
    "sdp_attention": "PyTorch's own attention is the default; remove it",
    "xformers_attention": "PyTorch's own attention is the default; remove it",
    "optimizer.betas": _BETAS,
    "optimizer.eps": _BETAS,
    "optimizer*": _ADAMW,
    "optim": _ADAMW,
    "optim_*": _ADAMW,
    "adam_*": _BETAS,
    "adam?_*": _BETAS,
    "lr_scheduler_kwargs": "min_lr_ratio is the final learning rate as a share of lr",
    "min_lr": "min_lr_ratio: the final learning rate as a share of lr",
    "group_by_length": "not needed: without packing, batches are always length-grouped; remove it",
    "length_column_name": "not needed: lengths are counted when the data is prepared; remove it",
    "device_map": "not needed: the plan places the base on each rank (zero_stage, offload_param)",
    "max_memory": "not needed: the plan keeps within the memory of each device; remove it",
    "low_cpu_mem_usage": "not needed: weights are loaded tensor by tensor; remove it",
    "gpu_memory_limit": "not needed: the plan keeps within the memory of each device, or within "
    f"--gpu-memory-gib of {command('plan')}; remove it",
    "fsdp*": _NO_FSDP,
    "tensor_parallel*": _NO_FSDP,
    "pipeline_parallel*": _NO_FSDP,
    "context_parallel*": _NO_FSDP,
    "sequence_parallel*": _NO_FSDP,
    "local_rank": "the launcher sets it; remove it",
    "ddp_find_unused_parameters": "not needed: DeepSpeed reduces the gradients; remove it",
    "ddp_timeout": "hang_timeout_s: the run ends after this many seconds without progress",
    "use_wandb": "trackers: [wandb]",
    "wandb*": _VARIABLES,
    "mlflow*": _TRACKER,
    "comet*": _OTHER_TRACKER,
    "swanlab*": _OTHER_TRACKER,
    "use_swanlab": _OTHER_TRACKER,
    "trackio*": _TRACKER,
    "use_tensorboard": _TRACKER,
    "tensorboard*": _TRACKER,
    "logging_dir": _TRACKER,
    "plot_loss": f"{command('report')} draws the loss; remove it",
    "push_to_hub*": _NO_HUB,
    "hub_*": _NO_HUB,
    "hf_use_auth_token": f"not needed: {command('prepare')} uses the token of `hf auth login`",
    "max_samples": "train_data: {path: ..., limit: N} takes the first N rows",
    "max_train_samples": "train_data: {path: ..., limit: N} takes the first N rows",
    "max_eval_samples": "eval_data: {path: ..., limit: N} takes the first N rows",
    "val_size": _HOLD_OUT,
    "val_set_size": _HOLD_OUT,
    "split_dataset_ratio": _HOLD_OUT,
    "dataset_test_split": "eval_data: org/name:test, a hub data set and its split",
    "dataset_train_split": "train_data: org/name:train, a hub data set and its split",
    "dataset_split": "train_data: org/name:train, a hub data set and its split",
    "dataset_text_field": "columns: {text: NAME}",
    "dataset_dir": "train_data takes paths; there is no folder of registered data sets",
    "interleave_probs": "{path, weight} in train_data; weight = share x all rows / its own rows",
    "mix_strategy": "sources are always interleaved; train_data: a list of {path: ..., weight: W}",
    "streaming": "not needed: prepared data is memory-mapped; remove it",
    "shuffle*": "data is shuffled by seed in each epoch; remove it",
    "dataset_prepared_path": "prepared data is in OUTPUT_DIR/data; remove it",
    "overwrite_cache": "not needed: prepared data is identified by its content; remove it",
    "preprocessing_num_workers": "not needed: rows are tokenised on every CPU; remove it",
    "dataset_num_proc": "not needed: rows are tokenised on every CPU; remove it",
    "dataset_processes": "not needed: rows are tokenised on every CPU; remove it",
    "dataset_type": _DETECTED_FORMAT,
    "remove_unused_columns": "data/audit.json counts columns that are not read; remove it",
    "train_on_inputs": "train_on: assistant (false) or all (true)",
    "train_on_prompt": "train_on: assistant (false) or all (true)",
    "mask_history": "train_on: last-assistant",
    "assistant_only_loss": "train_on: assistant",
    "completion_only_loss": "train_on: assistant",
    "loss_scale": "train_on: assistant, last-assistant or all; messages with weight: 0 never count",
    "roles_to_train": "train_on: assistant; messages with weight: 0 never count",
    "train_on_eos": "the end-of-turn token of a trained turn always counts; remove it",
    "enable_thinking": "chat_template_kwargs: {enable_thinking: true}",
    "reasoning_effort": "chat_template_kwargs: {reasoning_effort: high}",
    "special_tokens": _TEMPLATE,
    "eos_token": _TEMPLATE,
    "pad_token": _TEMPLATE,
    "add_bos_token": _TEMPLATE,
    "default_system": "put the system prompt into each row, as a message with role system",
    "pad_to_sequence_len": "not needed: micro-batches are padded to their longest row; remove it",
    "pad_to_multiple_of": "not needed: micro-batches are padded to their longest row; remove it",
    "pissa_init": "init_lora_weights: pissa, or pissa_niter_16 for the approximate decomposition",
    "pissa_iter": "init_lora_weights: pissa_niter_16 has the number of iterations",
    "pissa_convert": "not needed: the saved adapter belongs to the unchanged base; remove it",
    "loraplus_*": _UNSUPPORTED,
    "lorap_*": _UNSUPPORTED,
    "peft": "keys are not nested: lora_r, lora_alpha and so on; LoftQ is init_lora_weights: loftq",
    "loftq_*": _LOFTQ,
    "peft_layer_replication": _UNSUPPORTED,
    "peft_layers_pattern": "not needed: layers_to_transform counts the transformer blocks; "
    "remove it",
    "peft_autocast_adapter_dtype": "not needed: the adapter has fp32 masters; remove it",
    "lora_bias": _UNSUPPORTED,
    "lora_config": _NOT_NESTED,
    "peft_config": _NOT_NESTED,
    "training_arguments": _NOT_NESTED,
    "sft_config": _NOT_NESTED,
    "bias": _UNSUPPORTED,
    "unfrozen_parameters": _UNSUPPORTED,
    "resize_token_embeddings*": _NEW_TOKENS,
    "added_tokens*": _NEW_TOKENS,
    "add_tokens": _NEW_TOKENS,
    "add_special_tokens": _NEW_TOKENS,
    "new_special_tokens": _NEW_TOKENS,
    "additional_special_tokens": _NEW_TOKENS,
    "*trainable_token*": "not supported: modules_to_save trains all rows, new_tokens the rows of "
    "tokens that it adds",
    "*ensure_weight_tying": "not needed: modules_to_save keeps a tied pair tied; remove it",
    "lora_target_linear": "lora_target_modules: all-linear",
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "use_reentrant*": _CHECKPOINTING,
    "*eval_batch_size": _NO_EVAL_BATCH,
    "eval_accumulation_steps": _NO_EVAL_BATCH,
    "eval_delay": "not supported: evaluations start in the first epoch; remove it",
    "eval_on_start": f"{command('score')} measures the base and the adapter; remove it",
    "metric_for_best_model": "keep_best uses the held-out loss; remove it",
    "greater_is_better": "keep_best uses the held-out loss; remove it",
    "compute_accuracy": "eval_generate: N measures exact match at evaluations",
    "predict_with_generate": "eval_generate: N answers N held-out rows at evaluations",
    "save_only_model": "not needed: a checkpoint has 12 bytes per trainable parameter; remove it",
    "save_safetensors": "adapters and checkpoints are always safetensors; remove it",
    "save_first_step": "not supported; save_steps sets the interval of checkpoints",
    "merge_*": f"{command('merge')} merges the adapter after training",
    "use_liger_kernel": _KERNELS,
    "enable_liger_kernel": _KERNELS,
    "liger_*": _KERNELS,
    "use_unsloth*": _KERNELS,
    "unsloth_*": _KERNELS,
    "plugins": _KERNELS,
    "torch_compile*": _KERNELS,
    "compile": _KERNELS,
    "is_*_derived_model": "config.json of the model names its family; remove it",
    "model_type": "config.json of the model names its family; remove it",
    "tokenizer_type": "the tokenizer is the model's own; remove it",
    "tokenizer_name*": "the tokenizer is the model's own; remove it",
    "tokenizer": "the tokenizer is the model's own; remove it",
    "tokenizer.*": "the tokenizer is the model's own; remove it",
    "checkpointer.*": "not needed: model is the folder with the files; remove it",
    "loss.*": _LOSS,
    "metric_logger.*": _TRACKER,
    "batch_size_val": _NO_EVAL_BATCH,
    "profiler*": "not supported; remove it",
    "device": "not needed: every visible GPU is used; remove it",
    "no_cuda": _DEVICE,
    "use_cpu": _DEVICE,
    "use_mps_device": _DEVICE,
    "low_cpu_ram": "not needed: weights are loaded tensor by tensor; remove it",
    "num_processes": _LAUNCHER,
    "nproc_per_node": _LAUNCHER,
    "num_gpus": _LAUNCHER,
    "num_nodes": _LAUNCHER,
    "gpus": _LAUNCHER,
    "devices": _LAUNCHER,
    "accelerator*": _LAUNCHER,
    "log_peak_memory_stats": "not needed: metrics.jsonl has the memory of each step; remove it",
    "save_adapter_weights_only": f"only the adapter is saved; {command('merge')} merges it",
    "eval_sample_packing": _EVAL_PACKING,
    "eval_packing": _EVAL_PACKING,
    "processor_type": "not needed: rows with images are refused; remove it",
    "skip_prepare_dataset": f"rows are always prepared; {command('prepare')} does it in advance",
    "eot_tokens": _TEMPLATE,
    "quantize_moe_experts": "not supported: fused experts stay in 16 bits; remove it",
    "lora_target_parameters": "lora_target_modules: [auto, experts] adapts fused experts",
    "lora_fan_in_fan_out": "not needed: the layer's class decides it; remove it",
    "lora_*_kernel": _KERNELS,
    "cut_cross_entropy*": _KERNELS,
    "use_kernels": _KERNELS,
    "flash_attn_*": _KERNELS,
    "logging_strategy": _PROGRESS,
    "logging_first_step": _PROGRESS,
    "include_tokens_per_second": _PROGRESS,
    "include_num_input_tokens_seen": _PROGRESS,
    "log_level*": "not supported; remove it",
    "dataloader_*": _WORKERS,
    "use_cache": "not needed: training uses no cache of keys and values; remove it",
    "label_smoothing*": _LOSS,
    "loss_*": _LOSS,
    "*dft_loss": _LOSS,
    "*aux_loss*": "not supported: routers are frozen, so their loss is left out; remove it",
    "auxiliary_loss": "not supported: routers are frozen, so their loss is left out; remove it",
    "*_full_eval": _EVAL_TYPE,
    "half_precision_backend": "bf16: true, fp16: true, or both false for fp32",
    "float16": "fp16: true",
    "bfloat16": "bf16: true",
    "float32": "bf16: false and fp16: false",
    "precision": "bf16: true, fp16: true, or both false for fp32",
    "auto_find_batch_size": "batch_size: auto, the default, takes a size that fits; remove it",
    "full_determinism": "a resumed run equals an uninterrupted one "
    f"({DOCS}/reliability.md); remove it",
    "ignore_data_skip": "a resumed run continues at its next step; remove it",
    "galore*": _ADAMW,
    "use_galore": _ADAMW,
    "badam*": _ADAMW,
    "use_badam": _ADAMW,
    "apollo*": _ADAMW,
    "use_apollo": _ADAMW,
    "rope_scaling": _SHAPE,
    "max_position_embeddings": _SHAPE,
    "overrides_of_model*": _SHAPE,
    "model_init_kwargs": _SHAPE,
    "resize_vocab": _NEW_TOKENS,
    "freeze_*": _FROZEN,
    "shift_attn": "not supported; remove it",
    "s2_attention": "not supported; remove it",
    "eager_attention": "PyTorch's own attention is the default; remove it",
    "packing_strategy": "packs are made when the data is prepared; remove it",
    "multipack_real_batches": "packs are made when the data is prepared; remove it",
    "message_field_training*": _WEIGHTS,
    "message_property_mappings": "columns renames columns; the keys of messages: "
    f"{DOCS}/formats.md",
    "field_messages": "columns: {messages: NAME}",
    "custom_dataset_info": "train_data takes paths; there is no folder of registered data sets",
    "response_template": "train_on: assistant",
    "instruction_template": "train_on: assistant",
    "formatting_func": _DETECTED_FORMAT,
    "dataset_kwargs": _DETECTED_FORMAT,
    "system": "put the system prompt into each row, as a message with role system",
    "truncation_*": "over_length: truncate, drop, split or fail",
    "eval_max_new_tokens": f"{command('score')} generates answers after training; remove it",
    "eval_table_size": f"{command('score')} generates answers after training; remove it",
    "offload_optimizer": "not needed: the optimizer states of an adapter are small; remove it",
    "quantization_config": "load_in_4bit: true or load_in_8bit: true; both are bitsandbytes",
    "bnb_config": "load_in_4bit: true or load_in_8bit: true; both are bitsandbytes",
    "gptq*": "load_in_4bit: true or load_in_8bit: true; both are bitsandbytes",
    "lora_task_type": _ONLY_LORA,
    "sft_type": _ONLY_LORA,
    "apply_lora_to_*": "lora_target_modules: auto has all linear layers of the blocks",
    "sharding_strategy": _NO_FSDP,
    "cpu_offload": "offload_param: cpu",
    "custom_sharded_layers": _NO_FSDP,
    "parallelism_config": _NO_FSDP,
    "sp_size": _NO_FSDP,
    "expert_parallel*": _NO_FSDP,
    "ddp_*": "not needed: DeepSpeed reduces the gradients; remove it",
    "save_on_each_node": "not needed: rank 0 writes to the run folder; remove it",
    "enable_async_checkpointing": "not needed: a thread writes the checkpoints; remove it",
    "early_stopping": "early_stopping_patience: N evaluations without improvement",
    "patience": "early_stopping_patience: N evaluations without improvement",
    "monitor": "keep_best uses the held-out loss; remove it",
    "strict": "not needed: an unknown key is always an error; remove it",
}


_SCHEDULES = "the schedules are linear, cosine and constant, each after the warm-up"
_LEAVE_OUT = "leave it out for the default"
# Setting -> pattern of its values in other programs -> advice.
VALUES: Mapping[str, Mapping[str, str]] = {
    "lr_scheduler_type": {
        "constant_with_warmup": "constant: every schedule comes after the warm-up",
        "cosine_with_min_lr": "cosine, with min_lr_ratio for the last learning rate",
        "cosine_warmup_with_min_lr": "cosine, with min_lr_ratio for the last learning rate",
        "get_cosine_schedule_with_warmup": "cosine: every schedule comes after the warm-up",
        "get_linear_schedule_with_warmup": "linear: every schedule comes after the warm-up",
        "*": _SCHEDULES,
    },
    "bf16": {"full": "true: the frozen base is in bf16, the adapter keeps fp32 masters"},
    "gradient_checkpointing": {
        "unsloth": "true, or auto for as few layers as memory needs",
        "offload*": "true, or auto for as few layers as memory needs",
        "selective": "auto: as few layers as memory needs",
    },
    "lora_target_modules": {
        "all": "all-linear, or auto, which leaves out routers",
        "all_linear": "all-linear, or auto, which leaves out routers",
    },
    "evaluation_strategy": {"false": '"no"', "none": '"no"', "true": "steps or epoch"},
    "save_strategy": {
        "false": '"no"', "none": '"no"', "true": "steps or epoch",
        "best": "steps or epoch, with keep_best: true",
    },
    "max_steps": {"-1": _LEAVE_OUT, "0": _LEAVE_OUT},
    "save_total_limit": {
        "-1": "for no limit, a number above that of all checkpoints", "0": "at least 1",
    },
    "trackers": {"none": f"no tracker; {_LEAVE_OUT}", "all": _TRACKER.removeprefix("trackers: ")},
    "resume": {"true": "auto", "false": "never", "last": "auto", "latest": "auto"},
    "zero_stage": {
        "0": "1: the adapter's optimizer state is sharded", "*zero*1*": "1", "*zero*2*": "2",
        "*zero*3*": "3", "ds1": "1", "ds2": "2", "ds3": "3",
    },
    "use_flash_attention": {
        "fa2": "true", "flash_attention_*": "true", "sdpa": "auto", "eager": "auto",
        "disabled": "false",
    },
    "packing": {
        "auto": "true, or leave it out: then it is false for a class that does not keep packed "
        "documents separate",
    },
    "train_on": {
        "input*": "all", "all_assistant": "assistant", "last": "last-assistant",
        "last_turn": "last-assistant", "completion": "assistant", "turn": "assistant",
    },
    "over_length": {"left": "truncate", "right": "truncate", "delete": "drop", "raise": "fail"},
    "chat_template": {
        "tokenizer_default*": "model", "default": "model", "auto": "model", "jinja": "FILE.jinja",
        "*/*": "a file in UTF-8 whose name ends in .jinja",
        "*": "model for the model's own template, or FILE.jinja",
    },
}  # fmt: skip


def value_advice(setting: str, value: Any, *, is_valid: bool = False) -> str | None:
    """Advice for a value that other programs use for this setting; None if VALUES has none.

    `is_valid`: whether the setting accepts the value. A value that is accepted gets advice only if
    VALUES has exactly this text; patterns such as `0.*` are not tried. For example,
    `lora_target_modules: all` is accepted as a regular expression, but probably means all layers.
    """
    if not isinstance(value, str | int | float):
        return None
    text = str(value).strip().lower()
    for pattern, hint in VALUES.get(setting, {}).items():
        if text == pattern or (not is_valid and fnmatchcase(text, pattern)):
            return hint
    return None


def normalised(key: str) -> str:
    """An option in the spelling of the tables: `--learning-rate` becomes `learning_rate`."""
    return key.strip().lstrip("-").replace("-", "_").lower()


def advice(key: str) -> str | None:
    """Advice for an option of another training program; None if it is in none of the tables."""
    name = normalised(key)
    if setting := settings_by_trait("peers").get(name):
        return f"here it is {setting}"
    matches = (text for pattern, text in ADVICE.items() if fnmatchcase(name, pattern))
    return next(matches, None)

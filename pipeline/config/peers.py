"""Options of other training programs that are no setting here, and what does their work.

Names of a setting itself (`learning_rate` for `lr`) stand on its Field in settings.py. The options
are those of axolotl, LLaMA-Factory, TRL and transformers, ms-swift, and torchtune.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from pipeline.config.settings import settings_by

_NO_TRACKER = "no tracker is built in; metrics.jsonl has a line for each step, report.html shows it"
_NO_HUB = "nothing is uploaded; OUTPUT_DIR/adapter is an ordinary PEFT folder to upload"
_ADAMW = (
    "AdamW in fp32 is the only optimizer: the states of an adapter are small, so 8-bit or paged "
    "ones would save little; remove it"
)
_BETAS = "give betas and eps as optimizer.params of a deepspeed_json; the defaults are AdamW's"
_NOT_BUILT = "not supported; plain LoRA is trained"
_ONLY_LORA = "LoRA is always trained; QLoRA is load_in_4bit: true"
_NO_FSDP = "sharding is DeepSpeed's ZeRO: zero_stage, chosen by the plan"
_BY_ROW = "the format is detected from each row; data_format and columns change that"
_NO_EVAL_BATCH = "evaluation uses batch_size"
_TEMPLATE = "the model's own chat template and end of turn are used; see chat_template"
_NO_START = "a run cannot start from another adapter yet; resume: CHECKPOINT continues a run"
_KERNELS = "fast kernels are chosen by what is installed; remove it"

# Patterns of names -> what to do instead. The first match counts.
WITHOUT_A_SETTING: Mapping[str, str] = {
    "adapter": _ONLY_LORA,
    "finetuning_type": _ONLY_LORA,
    "train_type": _ONLY_LORA,
    "tuner_type": _ONLY_LORA,
    "use_peft": _ONLY_LORA,
    "task_type": _ONLY_LORA,
    "stage": "supervised fine-tuning is the only stage; zero_stage is DeepSpeed's",
    "rlhf_type": "supervised fine-tuning is the only stage",
    "rl": "supervised fine-tuning is the only stage",
    "do_train": "launch/train.py always trains; remove it",
    "do_eval": "eval_data says whether the held-out loss is measured; remove it",
    "do_predict": "launch/score.py generates answers after training; remove it",
    "quantization_bit": "load_in_4bit: true or load_in_8bit: true",
    "quant_bits": "load_in_4bit: true or load_in_8bit: true",
    "quantization_method": "load_in_4bit: true or load_in_8bit: true; both are bitsandbytes",
    "quant_method": "load_in_4bit: true or load_in_8bit: true; both are bitsandbytes",
    "torch_dtype": "bf16: true, fp16: true, or both false for fp32",
    "dtype": "bf16: true, fp16: true, or both false for fp32",
    "mixed_precision": "bf16: true, fp16: true, or both false for fp32",
    "pure_bf16": "bf16: true; the adapter keeps fp32 masters",
    "tf32": "not needed: matrix products run in bf16, fp16 or fp32 as the run says; remove it",
    "attn_implementation": "use_flash_attention: true for FlashAttention-2, else PyTorch's own",
    "attn_impl": "use_flash_attention: true for FlashAttention-2, else PyTorch's own",
    "sdp_attention": "PyTorch's own attention is the default; remove it",
    "xformers_attention": "PyTorch's own attention is the default; remove it",
    "optimizer*": _ADAMW,
    "optim": _ADAMW,
    "optim_*": _ADAMW,
    "adam_*": _BETAS,
    "adam?_*": _BETAS,
    "lr_scheduler_kwargs": "min_lr_ratio is the last learning rate as a share of lr",
    "min_lr": "min_lr_ratio: the last learning rate as a share of lr",
    "group_by_length": "not needed: packing fills sequences, and without it documents of like "
    "length share a step; remove it",
    "length_column_name": "not needed: lengths are counted when the data is prepared; remove it",
    "device_map": "not needed: the plan places the base on each rank (zero_stage, offload_param)",
    "max_memory": "not needed: the plan fits the run to each device; remove it",
    "low_cpu_mem_usage": "not needed: weights are loaded tensor by tensor; remove it",
    "gpu_memory_limit": "the plan fits the run to each device; --gpu-memory-gib of launch/plan.py",
    "fsdp*": _NO_FSDP,
    "tensor_parallel*": _NO_FSDP,
    "pipeline_parallel*": _NO_FSDP,
    "context_parallel*": _NO_FSDP,
    "sequence_parallel*": _NO_FSDP,
    "local_rank": "the launcher sets it; remove it",
    "ddp_find_unused_parameters": "not needed: DeepSpeed reduces the gradients; remove it",
    "ddp_timeout": "hang_timeout_s: seconds without progress before the run is ended",
    "report_to": _NO_TRACKER,
    "run_name": _NO_TRACKER,
    "use_wandb": _NO_TRACKER,
    "wandb*": _NO_TRACKER,
    "mlflow*": _NO_TRACKER,
    "comet*": _NO_TRACKER,
    "swanlab*": _NO_TRACKER,
    "use_swanlab": _NO_TRACKER,
    "trackio*": _NO_TRACKER,
    "use_tensorboard": _NO_TRACKER,
    "tensorboard*": _NO_TRACKER,
    "logging_dir": _NO_TRACKER,
    "metric_logger": _NO_TRACKER,
    "plot_loss": "launch/report.py draws the loss; remove it",
    "push_to_hub*": _NO_HUB,
    "hub_*": _NO_HUB,
    "hf_use_auth_token": "nothing is fetched by training; `hf auth login` is for launch/prepare.py",
    "max_samples": "train_data: {path: ..., limit: N} takes the first N rows",
    "max_train_samples": "train_data: {path: ..., limit: N} takes the first N rows",
    "max_eval_samples": "eval_data: {path: ..., limit: N} takes the first N rows",
    "val_size": "eval_data: 0.05 holds out a share of train_data, 200 that many rows",
    "val_set_size": "eval_data: 0.05 holds out a share of train_data, 200 that many rows",
    "split_dataset_ratio": "eval_data: 0.05 holds out a share of train_data, 200 that many rows",
    "dataset_test_split": "eval_data: org/name:test, a hub data set and its split",
    "dataset_train_split": "train_data: org/name:train, a hub data set and its split",
    "dataset_split": "train_data: org/name:train, a hub data set and its split",
    "dataset_text_field": "columns: {text: NAME}",
    "dataset_dir": "train_data takes paths; there is no folder of registered data sets",
    "interleave_probs": "train_data: a list of {path: ..., weight: W}",
    "mix_strategy": "sources are always interleaved; train_data: a list of {path: ..., weight: W}",
    "streaming": "not needed: prepared data is memory-mapped; remove it",
    "shuffle*": "data is shuffled by seed in each epoch; remove it",
    "dataset_prepared_path": "prepared data is in OUTPUT_DIR/data; remove it",
    "overwrite_cache": "not needed: prepared data is identified by its content; remove it",
    "preprocessing_num_workers": "not needed: rows are tokenised on every CPU; remove it",
    "dataset_num_proc": "not needed: rows are tokenised on every CPU; remove it",
    "dataset_processes": "not needed: rows are tokenised on every CPU; remove it",
    "dataset_type": _BY_ROW,
    "remove_unused_columns": "columns that are not read are counted in data/audit.json; remove it",
    "train_on_inputs": "train_on: assistant (false) or all (true)",
    "train_on_prompt": "train_on: assistant (false) or all (true)",
    "mask_history": "train_on: last-assistant",
    "assistant_only_loss": "train_on: assistant",
    "completion_only_loss": "train_on: assistant",
    "loss_scale": "train_on: assistant, last-assistant or all; a message of weight: 0 never counts",
    "roles_to_train": "train_on: assistant; a message of weight: 0 never counts",
    "train_on_eos": "the end of a trained turn is always trained; remove it",
    "enable_thinking": "chat_template_kwargs: {enable_thinking: true}",
    "reasoning_effort": "chat_template_kwargs: {reasoning_effort: high}",
    "adapter_name_or_path": _NO_START,
    "lora_model_dir": _NO_START,
    "adapters": _NO_START,
    "resume_from_adapter": _NO_START,
    "special_tokens": _TEMPLATE,
    "eos_token": _TEMPLATE,
    "pad_token": _TEMPLATE,
    "add_bos_token": _TEMPLATE,
    "default_system": "put the system prompt into the rows, as a message of role system",
    "pad_to_sequence_len": "not needed: micro-batches are padded to their longest row; remove it",
    "pad_to_multiple_of": "not needed: micro-batches are padded to their longest row; remove it",
    "neftune_noise_alpha": _NOT_BUILT,
    "noisy_embedding_alpha": _NOT_BUILT,
    "use_rslora": _NOT_BUILT,
    "use_dora": _NOT_BUILT,
    "peft_use_rslora": _NOT_BUILT,
    "peft_use_dora": _NOT_BUILT,
    "pissa_*": _NOT_BUILT,
    "init_lora_weights": _NOT_BUILT,
    "peft_init_lora_weights": _NOT_BUILT,
    "loraplus_*": _NOT_BUILT,
    "lorap_*": _NOT_BUILT,
    "loftq_config": _NOT_BUILT,
    "lora_bias": _NOT_BUILT,
    "bias": _NOT_BUILT,
    "unfrozen_parameters": _NOT_BUILT,
    "resize_token_embeddings*": _NOT_BUILT,
    "tokens": _NOT_BUILT,
    "added_tokens*": _NOT_BUILT,
    "lora_target_linear": "lora_target_modules: all-linear",
    "gradient_checkpointing_kwargs": "not needed: the plan chooses re-entrant or not; remove it",
    "*eval_batch_size": _NO_EVAL_BATCH,
    "eval_accumulation_steps": _NO_EVAL_BATCH,
    "eval_delay": "evaluations are counted from the first step; remove it",
    "eval_on_start": "launch/score.py compares with the base; remove it",
    "metric_for_best_model": "keep_best goes by the held-out loss; remove it",
    "greater_is_better": "keep_best goes by the held-out loss; remove it",
    "compute_accuracy": "launch/score.py measures exact match after training; remove it",
    "predict_with_generate": "launch/score.py generates answers after training; remove it",
    "save_only_model": "not needed: a checkpoint is 12 bytes a trainable parameter; remove it",
    "save_safetensors": "always; remove it",
    "save_first_step": "not needed: an adapter that does not learn ends the run after two steps",
    "merge_*": "launch/merge.py merges the adapter after training",
    "use_liger_kernel": _KERNELS,
    "enable_liger_kernel": _KERNELS,
    "liger_*": _KERNELS,
    "use_unsloth*": _KERNELS,
    "unsloth_*": _KERNELS,
    "plugins": _KERNELS,
    "torch_compile*": _KERNELS,
    "compile": _KERNELS,
    "is_*_derived_model": "the family is read from the model's config.json; remove it",
    "model_type": "the family is read from the model's config.json; remove it",
    "tokenizer_type": "the tokenizer is the model's own; remove it",
    "tokenizer_name*": "the tokenizer is the model's own; remove it",
    "tokenizer": "the tokenizer is the model's own; remove it",
    "strict": "always: an unknown key is an error; remove it",
}


def hint(key: str) -> str | None:
    """Advice for a key from another training program; None if no known program has it."""
    name = key.strip().lstrip("-").replace("-", "_").lower()
    if setting := settings_by("peers").get(name):
        return f"here it is {setting}"
    matches = (text for pattern, text in WITHOUT_A_SETTING.items() if fnmatchcase(name, pattern))
    return next(matches, None)

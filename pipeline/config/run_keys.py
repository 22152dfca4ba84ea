"""RunKeys: settings of the run folder, LoRA, the training, the evaluation and the checkpoints.

Each Field has the type, the default and the description of one setting. `traits(...)` adds facts
such as its names in other training programs (`peers`); traits.py explains them.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
)

from pipeline.commands import DOCS
from pipeline.config.data_keys import Auto, Share
from pipeline.config.data_names import MAX_EPOCHS, MAX_SEQUENCES, Positive, ProperFraction
from pipeline.config.frequency import Strategy
from pipeline.config.presets import Preset
from pipeline.config.traits import traits

SequenceCount = Annotated[int, Field(ge=1, le=MAX_SEQUENCES)]


def _float_to_int(value: Any) -> Any:
    """Convert a float without a fraction, such as 3.0, to int; return other values unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class RunKeys(BaseModel):
    """Settings of the run folder, LoRA, the training, the evaluation and the checkpoints."""

    # The run and its folder
    output_dir: Annotated[str, Field(min_length=1)] = Field(
        description="Run folder, which gets all files that the run writes.",
        json_schema_extra=traits(change="run", is_path=True, peers="output_path save_dir out_dir"),
    )
    overwrite: bool = Field(
        default=False,
        description="If `output_dir` holds a run with other settings, replace that run instead of "
        "refusing to start.",
        json_schema_extra=traits(change="run", peers="overwrite_output_dir"),
    )
    resume: Annotated[str, Field(min_length=1)] = Field(
        default="auto",
        description="`auto` resumes from the newest intact checkpoint if there is one; `must` "
        "refuses to start without one; `never` starts at step 0. Any other value is the folder of "
        "a checkpoint of any run, from which this run starts. Once this run has written newer "
        "checkpoints, it resumes from these.",
        json_schema_extra=traits(
            change="run", is_path=True, peers="resume_from_checkpoint auto_resume_from_checkpoints"
        ),
    )
    accept_changes: list[Literal["base", "data", "total_steps"]] = Field(
        default_factory=list,
        description="Allowed differences from the run that wrote the checkpoint: `base` (the "
        "model's weights), `data` (the training documents), `total_steps` (the length of the "
        "learning rate schedule).",
        json_schema_extra=traits(needs="resume!=never", change="run"),
    )
    preset: Preset | list[Preset] = Field(
        default_factory=list,
        description="Name of a preset (see the table of presets), or a list of names. A later "
        "preset overrides an earlier one, and the run file overrides all presets. In the run file, "
        "`max_steps` also replaces a preset's `epochs`, and `global_batch_size` its "
        "`gradient_accumulation_steps`.",
        json_schema_extra=traits(change="run"),
    )
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**63,
        description="Random seed of data order, initial adapter weights and dropout.",
        json_schema_extra=traits(peers="data_seed random_seed"),
    )

    # LoRA
    lora_r: Positive = Field(
        default=64,
        description="LoRA r: the inner dimension of the adapter matrices.",
        json_schema_extra=traits(peers="lora_rank r"),
    )
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] | Auto = Field(
        default="auto",
        description="The adapter's output is scaled by `lora_alpha` / `lora_r`. `auto` is the "
        "alpha that scales by 2: 2 x `lora_r`, or 2 x sqrt(`lora_r`) with `use_rslora`.",
        json_schema_extra=traits(peers="alpha"),
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05,
        description="Dropout probability on the adapter's input in training.",
        json_schema_extra=traits(peers="dropout"),
    )
    lora_target_modules: str | list[str] = Field(
        default="auto",
        description="Linear layers that get an adapter: a list of module names (full paths or "
        "their last parts), `all-linear`, or one regular expression that matches full paths. "
        "`auto`: all linear layers of the transformer blocks, except routers and fused experts. In "
        "a list, `experts` means the fused experts of a mixture-of-experts model: `[auto, "
        "experts]`.",
        json_schema_extra=traits(peers="target_modules lora_target lora_modules lora_attn_modules"),
    )

    init_adapter: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Adapter to start from: a PEFT LoRA folder, or the name of a hub adapter in "
        "the local cache. The optimizer state and the schedule start from scratch. The "
        "adapter's base, layers, r and scaling must be those of this run.",
        json_schema_extra=traits(
            is_path=True,
            peers="adapter_name_or_path lora_model_dir adapters resume_from_adapter "
            "lora_weights_path",
        ),
    )
    init_adapter_resize: bool = Field(
        default=False,
        description="Allow an `init_adapter` with a smaller r or another scaling. B is rescaled "
        "and padded with zeros, so that the run starts with the same outputs as that adapter.",
    )

    # Quantised base
    load_in_4bit: bool = Field(
        default=False,
        description="QLoRA: quantise the base to 4 bits.",
        json_schema_extra=traits(peers="use_4bit"),
    )
    load_in_8bit: bool = Field(
        default=False,
        description="Quantise the base to 8 bits (LLM.int8).",
        json_schema_extra=traits(peers="use_8bit", replaces="load_in_4bit"),
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4",
        description="4-bit data type.",
        json_schema_extra=traits(needs="load_in_4bit", peers="quantization_type"),
    )
    bnb_4bit_use_double_quant: bool = Field(
        default=True,
        description="Also quantise the quantisation constants, which saves 0.4 bits per weight.",
        json_schema_extra=traits(
            needs="load_in_4bit", peers="double_quantization use_nested_quant"
        ),
    )
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="Data type of matrix products with 4-bit weights; `auto` is the training data "
        "type.",
        json_schema_extra=traits(needs="load_in_4bit"),
    )
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        default="uint8",
        description="Data type of the tensors that hold 4-bit weights: `uint8`, or the training "
        "data type.",
        json_schema_extra=traits(needs="load_in_4bit", change="run"),
    )

    # Steps and batches
    epochs: Annotated[
        Positive | Annotated[float, Field(gt=0, le=MAX_EPOCHS)] | Auto,
        BeforeValidator(_float_to_int),
    ] = Field(
        default=1,
        description="Passes over the training data; fractions such as 2.5 are allowed. `auto`, the "
        "default if `max_steps` is set, is as many passes as that number of steps needs.",
        json_schema_extra=traits(change="total_steps", peers="num_epochs num_train_epochs"),
    )
    max_steps: Positive | None = Field(
        default=None,
        description="Number of optimizer steps; if `epochs` is a number too, the run ends at "
        "whichever limit is reached first.",
        json_schema_extra=traits(
            change="total_steps", peers="max_train_steps max_steps_per_epoch", replaces="epochs"
        ),
    )
    batch_size: SequenceCount | Auto = Field(
        default="auto",
        description="Sequences in a micro-batch, which is one forward pass on one rank; `auto`: "
        "the size with the shortest predicted step that fits in memory.",
        json_schema_extra=traits(
            change="run",
            layout="micro_batch_size",
            deepspeed="train_micro_batch_size_per_gpu",
            peers="micro_batch_size per_device_train_batch_size train_batch_size",
        ),
    )
    gradient_accumulation_steps: SequenceCount | Auto = Field(
        default="auto",
        description="Micro-batches per rank in an optimizer step; `auto` follows from "
        "`global_batch_size`.",
        json_schema_extra=traits(
            change="run",
            deepspeed="gradient_accumulation_steps",
            peers="grad_accum_steps accumulation_steps accumulate_grad_batches",
        ),
    )
    global_batch_size: SequenceCount | Auto = Field(
        default="auto",
        description="Sequences in an optimizer step over all ranks, equal to `batch_size` x "
        "`gradient_accumulation_steps` x ranks; `auto` is 16. Set it, and leave one of the other "
        "two `auto`, to train the same on any number of ranks.",
        json_schema_extra=traits(
            deepspeed="train_batch_size",
            peers="total_batch_size effective_batch_size",
            replaces="gradient_accumulation_steps",
        ),
    )

    # Optimisation
    lr: Annotated[float, Field(gt=0, le=1e30)] = Field(  # larger values overflow fp32 in Adam
        default=2e-4,
        description="Peak learning rate.",
        json_schema_extra=traits(deepspeed="optimizer.params.lr", peers="learning_rate"),
    )
    min_lr_ratio: Share = Field(
        default=0.0,
        description="Learning rate of the last step as a share of `lr`.",
        json_schema_extra=traits(needs="lr_scheduler_type!=constant", peers="cosine_min_lr_ratio"),
    )
    warmup_ratio: Share | None = Field(
        default=0.03,
        description="Warm-up as a share of all steps; cannot be combined with `warmup_steps`.",
    )
    warmup_steps: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Warm-up in steps; a value below 1 is a share of all steps. Cannot be combined "
        "with `warmup_ratio`.",
        json_schema_extra=traits(peers="num_warmup_steps lr_warmup_steps", replaces="warmup_ratio"),
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        default="cosine",
        description="Learning rate schedule after the warm-up.",
        json_schema_extra=traits(peers="lr_scheduler lr_schedule"),
    )
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.01,
        description="AdamW's weight decay.",
        json_schema_extra=traits(deepspeed="optimizer.params.weight_decay", peers="wd"),
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="Gradients are clipped to this global norm; 0 disables clipping.",
        json_schema_extra=traits(
            deepspeed="gradient_clipping", peers="gradient_clipping clip_grad_norm"
        ),
    )

    # Precision, memory, speed
    bf16: bool | Auto = Field(
        default="auto",
        description="Train in bfloat16; `auto` is true if the device supports it. If `bf16` and "
        "`fp16` are both false, the run trains in fp32.",
        json_schema_extra=traits(deepspeed="bf16.enabled"),
    )
    fp16: bool | Auto = Field(
        default="auto",
        description="Train in float16 with loss scaling; `auto` is true if the device does not "
        "support bfloat16.",
        json_schema_extra=traits(deepspeed="fp16.enabled", replaces="bf16"),
    )
    zero_stage: Annotated[int, Field(ge=1, le=3)] | Auto = Field(
        default="auto",
        description="ZeRO stage: 1 and 2 replicate the base, 3 shards it over the ranks; `auto` "
        "uses 3 only if the base does not fit otherwise.",
        json_schema_extra=traits(
            change="run", layout="zero_stage", deepspeed="zero_optimization.stage"
        ),
    )
    hpz_partition_size: Positive | Auto = Field(
        default="auto",
        description="ZeRO-3: number of ranks over which a second copy of the base is sharded, so "
        "that gathers stay within a node. Either the number of ranks per node, or 1 for no second "
        "copy.",
        json_schema_extra=traits(
            needs="zero_stage=auto|3",
            change="run",
            layout="hpz_partition_size",
            deepspeed="zero_optimization.zero_hpz_partition_size",
        ),
    )
    offload_param: Literal["none", "cpu"] | Auto = Field(
        default="auto",
        description="ZeRO-3: `cpu` offloads the sharded base to host memory, `none` keeps it on "
        "the GPUs; `auto` is `none` if it fits there.",
        json_schema_extra=traits(
            needs="zero_stage=auto|3",
            change="run",
            layout="offload_param",
            deepspeed="zero_optimization.offload_param.device",
        ),
    )
    sequence_parallel_size: Positive | Auto = Field(
        default="auto",
        description="Number of consecutive ranks that share each sequence, so that each of them "
        "holds the activations of a part of its tokens (Ulysses sequence parallelism, "
        f"{DOCS}/long.md). It must divide the model's attention heads and the ranks of a node; a "
        "multiple of the ranks of a node lets a group span nodes. `auto` is 1, so that each rank "
        "has its own sequences, unless these only fit in groups within a node.",
        json_schema_extra=traits(
            change="run",
            layout="sequence_parallel_size",
            peers="context_parallel_size sequence_parallel_degree",
        ),
    )
    offload_activations: bool | Auto = Field(
        default="auto",
        description="Store the inputs of checkpointed layers in host memory until the backward "
        "pass; the copies overlap with computing. `true` checkpoints every layer; `auto` does this "
        "only if the run does not fit otherwise.",
        json_schema_extra=traits(
            needs="gradient_checkpointing!=false",
            change="run",
            layout="offload_activations",
            peers="activation_offloading activation_cpu_offload",
        ),
    )
    mlp_tiles: Positive | Auto = Field(
        default="auto",
        description="Number of parts into which each MLP divides a sequence. It computes one part "
        "at a time, and again in the backward pass, which needs less memory and more time. `auto` "
        "is 1. For sequences of 16,384 tokens and more it is one part per 4,096 tokens if the run "
        "then fits in memory or is faster.",
        json_schema_extra=traits(
            change="run", layout="mlp_tiles", peers="tiled_mlp_num_shards tiled_mlp"
        ),
    )
    deepspeed_json: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="DeepSpeed JSON file whose keys replace generated ones; the value `auto` keeps "
        f"the generated value. The result is checked by the rules in {DOCS}/rules.md.",
        json_schema_extra=traits(change="run", is_path=True, peers="deepspeed deepspeed_config"),
    )
    gradient_checkpointing: bool | Auto = Field(
        default="auto",
        description="Recompute activations in the backward pass. `auto` does this in as few layers "
        "as are needed for the run to fit in memory.",
        json_schema_extra=traits(
            change="run",
            layout="checkpointed_layers",
            peers="activation_checkpointing enable_activation_checkpointing",
        ),
    )
    use_flash_attention: bool | Auto = Field(
        default="auto",
        description="Use FlashAttention-2 (package flash-attn); `auto` is PyTorch's own attention.",
        json_schema_extra=traits(peers="flash_attention flash_attn use_flash_attn"),
    )
    fast_paths: bool = Field(
        default=True,
        description="Use faster computations with the same results, as far as they apply to the "
        f"run ({DOCS}/speed.md; plan.json has the reason for each that does not); `false` uses the "
        "plain computations of transformers, peft and DeepSpeed.",
        json_schema_extra=traits(change="run"),
    )
    dataloader_num_workers: Annotated[int, Field(ge=0, le=256)] = Field(
        default=0,
        description="Worker processes per rank that build batches. 0 uses a thread; that is "
        "usually fast enough, because the token ids are memory-mapped.",
        json_schema_extra=traits(change="run", peers="num_workers"),
    )
    dataloader_prefetch_factor: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=2,
        description="Micro-batches that each worker process builds ahead.",
        json_schema_extra=traits(needs="dataloader_num_workers", change="run"),
    )

    # Monitoring, saving, stopping
    logging_steps: Positive = Field(
        default=10,
        description="Steps between progress lines, where the output is not a terminal. The first "
        "step has a line too, and a step that ends after a minute without one.",
        json_schema_extra=traits(change="run", peers="log_every_n_steps log_interval"),
    )
    evaluation_strategy: Strategy = Field(
        default="epoch",
        description="When the held-out loss is measured, if there is `eval_data`: every "
        "`eval_steps` steps, at the end of each epoch, or never. If `eval_steps` is set, the "
        "default is `steps`.",
        json_schema_extra=traits(needs="eval_data", change="selection", peers="eval_strategy"),
    )
    eval_steps: Positive | ProperFraction | None = Field(
        default=100,
        description="Steps between evaluations with `evaluation_strategy: steps`; below 1, a "
        "fraction of the run.",
        json_schema_extra=traits(
            needs="eval_data evaluation_strategy=steps", change="selection", peers="eval_interval"
        ),
    )
    evals_per_epoch: Positive | None = Field(
        default=None,
        description="Number of evenly spaced evaluations in each epoch; cannot be combined with "
        "`eval_steps`.",
        json_schema_extra=traits(needs="eval_data", change="selection", replaces="eval_steps"),
    )
    eval_generate: Positive | None = Field(
        default=None,
        description="Number of held-out rows that each evaluation also answers, greedily, to "
        "record exact match, valid JSON and the match of `eval_regex` with 95 % intervals "
        f"({DOCS}/scoring.md). The predicted time of the run includes this.",
        json_schema_extra=traits(change="run"),
    )
    eval_regex: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Regular expression that extracts the part of an answer to compare: the first "
        "group, or else the whole, of its last match. Also the default of "
        "--regex of the verb score.",
        json_schema_extra=traits(change="run"),
    )
    save_strategy: Strategy = Field(
        default="steps",
        description="When a checkpoint is written: every `save_steps` steps, at the end of each "
        "epoch, or never.",
        json_schema_extra=traits(change="run"),
    )
    save_steps: Positive | ProperFraction | None = Field(
        default=100,
        description="Steps between checkpoints with `save_strategy: steps`; below 1, a fraction of "
        "the run.",
        json_schema_extra=traits(
            needs="save_strategy=steps", change="run", peers="save_interval save_every_n_steps"
        ),
    )
    saves_per_epoch: Positive | None = Field(
        default=None,
        description="Number of evenly spaced checkpoints in each epoch; cannot be combined with "
        "`save_steps`.",
        json_schema_extra=traits(change="run", replaces="save_steps"),
    )
    save_total_limit: Positive = Field(
        default=2,
        description="Number of checkpoints to keep.",
        json_schema_extra=traits(change="run", peers="saves_total_limit"),
    )
    save_must_succeed: bool = Field(
        default=False,
        description="End the run if a checkpoint cannot be written; if false, the run logs a "
        "warning and tries again at the next save.",
        json_schema_extra=traits(change="run"),
    )
    keep_best: bool = Field(
        default=False,
        description="Publish the adapter with the lowest held-out loss instead of the last one.",
        json_schema_extra=traits(peers="load_best_model_at_end"),
    )
    early_stopping_patience: Positive | None = Field(
        default=None,
        description="End training after this many evaluations without a lower held-out loss.",
    )
    trackers: list[Literal["wandb", "tensorboard", "mlflow", "trackio"]] = Field(
        default_factory=list,
        description="Experiment trackers that follow the run, each in a process of its own: "
        f"{DOCS}/trackers.md.",
        json_schema_extra=traits(change="run", peers="report_to metric_logger"),
    )
    tracker_project: Annotated[str, Field(min_length=1, max_length=100)] = Field(
        default="rankzero",
        description="Project or experiment of the run in its trackers.",
        json_schema_extra=traits(
            needs="trackers",
            change="run",
            peers="wandb_project trackio_project mlflow_experiment_name",
        ),
    )
    run_name: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        default=None,
        description="Name of the run in its trackers; without it the name of `output_dir`.",
        json_schema_extra=traits(
            needs="trackers", change="run", peers="wandb_name wandb_run_name wandb_run_id"
        ),
    )
    run_group: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        default=None,
        description="Group of the run in its trackers, for example the name of a sweep.",
        json_schema_extra=traits(needs="trackers", change="run", peers="wandb_group"),
    )
    tracker_uploads: list[Literal["adapter", "answers"]] = Field(
        default_factory=list,
        description="Files that the trackers get in addition to the metrics: the `adapter`, and "
        "the `answers` to held-out rows that the verb score generated.",
        json_schema_extra=traits(needs="trackers", change="run"),
    )
    time_limit: str | None = Field(
        default=None,
        description="Stop with a checkpoint after this time, `HH:MM:SS` in quotes; the next start "
        "resumes the run.",
        json_schema_extra=traits(change="run"),
    )
    hang_timeout_s: Positive = Field(
        default=900,
        description="If a rank finishes no micro-batch for this many seconds, end the run and name "
        "the rank.",
        json_schema_extra=traits(change="run"),
    )

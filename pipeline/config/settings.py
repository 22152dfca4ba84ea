"""RunSettings: every key that a run file may hold, with its default, unit and description.

docs/configuration.md is generated from the descriptions here. No torch, no other room of the
project: what a key means for a model or a machine is the plan's business.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from pipeline.config.data_names import (
    DataFormat,
    DataNames,
    DataSource,
    Positive,
    columns_of_a_format,
    names_of_data,
    names_or_how_much,
    sources,
)
from pipeline.config.frequency import Frequency, Strategy, frequency
from pipeline.config.traits import Change, traits

Auto = Literal["auto"]
Share = Annotated[float, Field(ge=0, le=1)]

_TIME = re.compile("[0-9]{1,6}:[0-9]{1,6}:[0-9]{1,6}")
# A key that takes the place of another one.
_REPLACES = {
    "warmup_steps": "warmup_ratio",
    "evals_per_epoch": "eval_steps",
    "saves_per_epoch": "save_steps",
}

SEVEN_PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


def whole_number(value: Any) -> Any:
    """3.0 as 3; other values as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class RunSettings(BaseModel):
    """What the user asked for, validated; keys left out have the defaults below."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # What goes in and where it goes
    model: str = Field(
        description="Folder of the base model (config.json, safetensors, tokenizer), or the name "
        "of a hub model that lies in the local cache.",
        json_schema_extra=traits(change="base"),
    )
    train_data: Annotated[DataNames, BeforeValidator(names_of_data)] = Field(
        description="What to train on: a file, a folder, a glob or a hub name "
        "(`org/name:split`), or a list of them, each a name or `{path, weight, limit}`: "
        "`weight` is how often an epoch its rows are seen (1), `limit` takes its first rows.",
        json_schema_extra=traits(change="files"),
    )
    eval_data: Annotated[
        DataNames | Annotated[float, Field(gt=0, lt=1)] | Positive | None,
        BeforeValidator(names_or_how_much),
    ] = Field(
        default=None,
        description="Held-out data, named as in `train_data`; or how much of the training data to "
        "hold out, by content: a share (`0.05`) or a number of rows.",
        json_schema_extra=traits(change="files"),
    )
    data_format: DataFormat | Auto = Field(
        default="auto",
        description="Format of the rows; `auto` goes by the columns of each row.",
        json_schema_extra=traits(change="documents"),
    )
    columns: Annotated[dict[str, str], AfterValidator(columns_of_a_format)] = Field(
        default_factory=dict,
        description="Names that the data has for the columns of its format, for example "
        "`{prompt: question, completion: answer}`.",
        json_schema_extra=traits(change="documents"),
    )
    on_bad_row: Literal["reject", "fail"] = Field(
        default="reject",
        description="Count bad rows and leave them out, or end at the first.",
        json_schema_extra=traits(change="run"),
    )
    output_dir: str = Field(
        description="The run folder; everything that a run leaves is in it.",
        json_schema_extra=traits(change="run"),
    )
    overwrite: bool = Field(
        default=False,
        description="Replace a run with other settings in `output_dir` instead of refusing.",
        json_schema_extra=traits(change="run"),
    )
    resume: Annotated[str, Field(min_length=1)] = Field(
        default="auto",
        description="`auto` goes on from the newest intact checkpoint if there is one, `must` "
        "refuses to start without one, `never` starts from step 0. Anything else is the folder of "
        "one checkpoint, of this run or another, to start from; started again, the run goes on "
        "from what it has written since.",
        json_schema_extra=traits(change="run"),
    )
    accept_changes: list[Literal["base", "data", "total_steps"]] = Field(
        default_factory=list,
        description="What may differ from the run that wrote the checkpoint: `base` (the model's "
        "weights), `data` (the training documents), `total_steps` (the learning rate's course).",
        json_schema_extra=traits(change="run"),
    )
    preset: str | list[str] = Field(
        default_factory=list,
        description="Name or names of presets; a later one wins, the run file wins over all.",
        json_schema_extra=traits(change="run"),
    )
    seed: int = Field(
        default=42, ge=0, lt=2**63, description="Seed of data order, adapter weights and dropout."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that the model folder brings along."
    )

    # LoRA
    lora_r: Positive = Field(default=64, description="Inner dimension of the adapter matrices.")
    lora_alpha: Annotated[float, Field(gt=0)] | Auto = Field(
        default="auto", description="The update is scaled by alpha / r; `auto` is 2 x `lora_r`."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05, description="Dropout on the input of the adapter, while training."
    )
    lora_target_modules: str | list[str] = Field(
        default_factory=lambda: list(SEVEN_PROJECTIONS),
        description="Linear layers that get an adapter: a list of module names (the end of the "
        "path is enough), `all-linear`, or one regular expression for the whole path.",
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="Modules trained in full beside the adapter. Not available yet.",
    )

    # Quantised base
    load_in_4bit: bool = Field(default=False, description="QLoRA: hold the base in 4 bits.")
    load_in_8bit: bool = Field(default=False, description="Hold the base in 8 bits (LLM.int8).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4", description="4-bit data type."
    )
    bnb_4bit_use_double_quant: bool = Field(
        default=True, description="Quantise the quantisation constants too (0.4 bit a weight less)."
    )
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="Type that 4-bit weights are expanded to; `auto`: as trained."
    )
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        default="uint8",
        description="Type that packed 4-bit weights are stored as: `uint8`, or the one the run "
        "trains in.",
        json_schema_extra=traits(change="run"),
    )

    # Batches and length
    epochs: Annotated[
        Positive | Annotated[float, Field(gt=0)] | Auto, BeforeValidator(whole_number)
    ] = Field(
        default=1,
        description="Passes over the training data, also 0.5 or 2.5; `auto`, the default where "
        "`max_steps` is given: as many as those steps take.",
        json_schema_extra=traits(change="total_steps"),
    )
    max_steps: Positive | None = Field(
        default=None,
        description="Steps of the run; with `epochs` it ends at whichever comes first.",
        json_schema_extra=traits(change="total_steps"),
    )
    batch_size: Positive | Auto = Field(
        default="auto",
        description="Sequences of a micro-batch: one forward on one rank.",
        json_schema_extra=traits(
            change="run", layout="micro_batch_size", deepspeed="train_micro_batch_size_per_gpu"
        ),
    )
    gradient_accumulation_steps: Positive | Auto = Field(
        default="auto",
        description="Micro-batches a rank adds up before a step.",
        json_schema_extra=traits(change="run", deepspeed="gradient_accumulation_steps"),
    )
    global_batch_size: Positive | Auto = Field(
        default="auto",
        description="Sequences of one step over all ranks = `batch_size` x "
        "`gradient_accumulation_steps` x ranks; give it and leave one of the two `auto` to keep "
        "a run the same on any number of ranks. 16 where nothing is given.",
        json_schema_extra=traits(deepspeed="train_batch_size"),
    )
    max_length: Positive = Field(
        default=1024,
        description="Longest sequence, in tokens.",
        json_schema_extra=traits(change="documents"),
    )
    over_length: Literal["truncate", "drop", "split", "fail"] = Field(
        default="truncate",
        description="What happens to a document of more than `max_length` tokens: its end is cut "
        "off, it is left out, it becomes several, or the run is refused.",
        json_schema_extra=traits(change="documents"),
    )
    packing: bool = Field(
        default=True,
        description="Lay whole documents end to end in sequences of `max_length` tokens, each of "
        "them attended to as if it were alone; `batch_size` and `global_batch_size` then count "
        "these packs.",
        json_schema_extra=traits(change="documents"),
    )
    train_on: Literal["assistant", "last-assistant", "all"] = Field(
        default="assistant",
        description="Which turns of a conversation count in the loss; messages of `weight: 0` "
        "never do.",
        json_schema_extra=traits(change="documents"),
    )
    split_turns: bool = Field(
        default=False,
        description="Make one document of each assistant turn and what comes before it, for "
        "templates that rewrite earlier turns.",
        json_schema_extra=traits(change="documents"),
    )
    chat_template: Literal["model", "chatml"] = Field(
        default="model",
        description="`chatml` for a model without a chat template of its own; turns end with "
        "its end-of-sequence token.",
        json_schema_extra=traits(change="documents"),
    )
    max_rejected: Share = Field(
        default=0.01,
        description="Share of bad rows up to which they are counted and left out.",
        json_schema_extra=traits(change="run"),
    )

    # Optimisation
    lr: Annotated[float, Field(gt=0)] = Field(
        default=2e-4,
        description="Highest learning rate.",
        json_schema_extra=traits(deepspeed="optimizer.params.lr"),
    )
    min_lr_ratio: Share = Field(default=0.0, description="Last learning rate as a share of `lr`.")
    warmup_ratio: Share | None = Field(
        default=0.03, description="Warm-up as a share of all steps; not with `warmup_steps`."
    )
    warmup_steps: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Warm-up in steps; below 1 a share of all steps. Not with `warmup_ratio`.",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        default="cosine", description="Course of the learning rate after the warm-up."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.01,
        description="AdamW's decay.",
        json_schema_extra=traits(deepspeed="optimizer.params.weight_decay"),
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="Clip the global gradient norm to this; 0 clips nothing.",
        json_schema_extra=traits(deepspeed="gradient_clipping"),
    )

    # Precision, memory, speed
    bf16: bool | Auto = Field(
        default="auto",
        description="Train in bfloat16; with `fp16` also false, in fp32.",
        json_schema_extra=traits(deepspeed="bf16.enabled"),
    )
    fp16: bool | Auto = Field(
        default="auto",
        description="Train in float16 with loss scaling.",
        json_schema_extra=traits(deepspeed="fp16.enabled"),
    )
    zero_stage: Annotated[int, Field(ge=1, le=3)] | Auto = Field(
        default="auto",
        description="ZeRO stage; 3 shards the base over the ranks.",
        json_schema_extra=traits(
            change="run", layout="zero_stage", deepspeed="zero_optimization.stage"
        ),
    )
    hpz_partition_size: Positive | Auto = Field(
        default="auto",
        description="Ranks that share a second copy of the base at ZeRO-3, so that gathers stay "
        "among them: those of a node, or 1 for no second copy.",
        json_schema_extra=traits(
            change="run",
            layout="hpz_partition_size",
            deepspeed="zero_optimization.zero_hpz_partition_size",
        ),
    )
    offload_param: Literal["none", "cpu"] | Auto = Field(
        default="auto",
        description="Where the sharded base is kept at ZeRO-3 between its uses.",
        json_schema_extra=traits(
            change="run", layout="offload_param", deepspeed="zero_optimization.offload_param.device"
        ),
    )
    deepspeed_json: str | None = Field(
        default=None,
        description="A DeepSpeed JSON whose keys are laid over the generated config; `auto` in it "
        "means what the plan generates. Held to docs/rules.md.",
        json_schema_extra=traits(change="run"),
    )
    gradient_checkpointing: bool | Auto = Field(
        default="auto",
        description="Recompute activations in the backward pass to save memory.",
        json_schema_extra=traits(change="run", layout="checkpointed_layers"),
    )
    use_flash_attention: bool | Auto = Field(
        default="auto", description="FlashAttention-2 (package flash-attn); `auto`: PyTorch's own."
    )
    dataloader_num_workers: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Processes a rank that build batches; 0: a thread builds the next one, which "
        "is enough, because ids are memory-mapped.",
        json_schema_extra=traits(change="run"),
    )
    dataloader_prefetch_factor: Positive = Field(
        default=2,
        description="Micro-batches that each of those processes builds ahead, where there are any.",
        json_schema_extra=traits(change="run"),
    )

    # Watching, saving, stopping
    logging_steps: Positive = Field(
        default=10,
        description="Steps between lines in the terminal.",
        json_schema_extra=traits(change="run"),
    )
    evaluation_strategy: Strategy = Field(
        default="epoch",
        description="When the held-out loss is measured, if there is `eval_data`: every "
        "`eval_steps` steps, at the end of each epoch, or never. With `eval_steps` given the "
        "default is `steps`.",
        json_schema_extra=traits(change="selection"),
    )
    eval_steps: Positive | None = Field(
        default=100,
        description="Steps between evaluations with `evaluation_strategy: steps`.",
        json_schema_extra=traits(change="selection"),
    )
    evals_per_epoch: Positive | None = Field(
        default=None,
        description="Evaluations in each epoch, evenly spaced; not with `eval_steps`.",
        json_schema_extra=traits(change="selection"),
    )
    save_strategy: Strategy = Field(
        default="steps",
        description="When a checkpoint is written: every `save_steps` steps, at the end of each "
        "epoch, or never.",
        json_schema_extra=traits(change="run"),
    )
    save_steps: Positive | None = Field(
        default=100,
        description="Steps between checkpoints with `save_strategy: steps`.",
        json_schema_extra=traits(change="run"),
    )
    saves_per_epoch: Positive | None = Field(
        default=None,
        description="Checkpoints in each epoch, evenly spaced; not with `save_steps`.",
        json_schema_extra=traits(change="run"),
    )
    save_total_limit: Positive = Field(
        default=2,
        description="Checkpoints kept.",
        json_schema_extra=traits(change="run"),
    )
    save_must_succeed: bool = Field(
        default=False,
        description="End the run when a checkpoint cannot be written; otherwise that is said, and "
        "tried again at the next save.",
        json_schema_extra=traits(change="run"),
    )
    keep_best: bool = Field(
        default=False, description="Export the adapter of the lowest held-out loss, not the last."
    )
    early_stopping_patience: Positive | None = Field(
        default=None, description="End after this many evaluations without a lower held-out loss."
    )
    time_limit: str | None = Field(
        default=None,
        description="Stop with a checkpoint after this time, `HH:MM:SS`; start again to go on.",
        json_schema_extra=traits(change="run"),
    )
    hang_timeout_s: Positive = Field(
        default=900,
        description="Seconds without a finished micro-batch on any rank after which the run is "
        "ended, naming the rank that hangs.",
        json_schema_extra=traits(change="run"),
    )

    @field_validator("time_limit")
    @classmethod
    def _hours_minutes_seconds(cls, value: str | None) -> str | None:
        if value is not None and not (_TIME.fullmatch(value) and _seconds(value)):
            raise ValueError("expected HH:MM:SS above zero, for example '03:50:00'")
        return value

    @field_validator("warmup_steps")
    @classmethod
    def _steps_or_share(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and not value.is_integer():
            raise ValueError("expected a whole number of steps, or a share below 1")
        return value

    @model_validator(mode="before")
    @classmethod
    def _keys_that_decide_others(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Set the keys that a given key replaces; null in run.yaml says that they do not count."""
        given = {key for key, value in values.items() if value is not None}
        values = dict(values)
        for key, other in _REPLACES.items():
            if key in given and other in given:
                raise ValueError(f"{key} and {other}: both are given; keep one of them")
            if key in given:
                values[other] = None
        for strategy, steps, per_epoch in (
            ("evaluation_strategy", "eval_steps", "evals_per_epoch"),
            ("save_strategy", "save_steps", "saves_per_epoch"),
        ):
            if per_epoch in given and values.setdefault(strategy, "epoch") != "epoch":
                raise ValueError(f"{per_epoch}: needs {strategy}: epoch; leave {strategy} out")
            if steps in given:
                values.setdefault(strategy, "steps")
            elif steps in values and values.get(strategy) == "steps":
                raise ValueError(f"{strategy}: steps needs {steps}")
        if "max_steps" in given:
            values.setdefault("epochs", "auto")
        elif values.get("epochs") == "auto":
            raise ValueError("epochs: auto needs max_steps; give either as a number")
        return values

    @model_validator(mode="after")
    def _keys_that_exclude_each_other(self) -> Self:
        if self.bf16 is True and self.fp16 is True:
            raise ValueError("bf16 and fp16: both are true; keep one of them")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit: both are true; keep one of them")
        if self.split_turns and self.train_on == "all":
            raise ValueError(
                "split_turns: with train_on: all the turns before each would be trained again and "
                "again; use train_on: assistant"
            )
        needs_eval = [k for k in ("keep_best", "early_stopping_patience") if getattr(self, k)]
        if needs_eval and (self.eval_data is None or self.evaluation_strategy == "no"):
            raise ValueError(
                f"{needs_eval[0]}: needs eval_data and an evaluation_strategy of steps or epoch"
            )
        return self

    @property
    def train_sources(self) -> list[DataSource]:
        """`train_data` as a list of sources."""
        return sources(self.train_data)

    @property
    def eval_sources(self) -> list[DataSource]:
        """`eval_data` as a list of sources; none where it is held out of the training data."""
        return [] if isinstance(self.eval_data, int | float) else sources(self.eval_data)

    @property
    def held_out(self) -> float | int | None:
        """Share (float) or number (int) of training rows to hold out; None where there are none."""
        return self.eval_data if isinstance(self.eval_data, int | float) else None

    @property
    def alpha(self) -> float:
        """`lora_alpha` as a number."""
        return 2.0 * self.lora_r if self.lora_alpha == "auto" else self.lora_alpha

    @property
    def is_quantised(self) -> bool:
        """Whether the base is held in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def evaluations(self) -> Frequency | None:
        """How often the held-out loss is measured; None for never."""
        return frequency(self.evaluation_strategy, self.eval_steps, self.evals_per_epoch)

    @property
    def saves(self) -> Frequency | None:
        """How often a checkpoint is written; None for never."""
        return frequency(self.save_strategy, self.save_steps, self.saves_per_epoch)

    @property
    def time_limit_s(self) -> float | None:
        """`time_limit` in seconds."""
        return None if self.time_limit is None else _seconds(self.time_limit)


def _seconds(time: str) -> float:
    hours, minutes, seconds = (int(part) for part in time.split(":"))
    return 3600.0 * hours + 60 * minutes + seconds


def settings_with(*changes: Change) -> frozenset[str]:
    """Names of the settings whose change means one of these."""
    names = RunSettings.model_fields
    return frozenset(name for name in names if _traits_of(name)["change"] in changes)


def settings_by(trait: Literal["layout", "deepspeed", "peers"]) -> dict[str, str]:
    """Names of the settings that have the trait, by each of its values."""
    by_value: dict[str, str] = {}
    for name in RunSettings.model_fields:
        values: Any = _traits_of(name)[trait] or []
        by_value |= dict.fromkeys([values] if isinstance(values, str) else values, name)
    return by_value


def _traits_of(name: str) -> JsonDict:
    extra = RunSettings.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else traits()

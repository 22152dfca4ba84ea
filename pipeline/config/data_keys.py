"""DataKeys: the settings of base model and data, with type, default, description and traits."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
)

from pipeline.config.data_names import (
    DataFormat,
    DataNames,
    Positive,
    columns_of_a_format,
    names_of_data,
    names_or_amount,
    template_name,
    template_variables,
)
from pipeline.config.traits import traits

Auto = Literal["auto"]
Share = Annotated[float, Field(ge=0, le=1)]


class DataKeys(BaseModel):
    """Settings of the base model, of the training data, and of tokenisation."""

    model: Annotated[str, Field(min_length=1)] = Field(
        description="Base model: a folder (config.json, safetensors, tokenizer), or the name of "
        "a hub model in the local cache.",
        json_schema_extra=traits(
            change="base",
            is_path=True,
            peers="base_model model_name_or_path model_name model_id model_id_or_path "
            "pretrained_model_name_or_path",
        ),
    )
    model_revision: str | None = Field(
        default=None,
        description="Commit, branch or tag of a hub model (`main`); run.yaml records the commit.",
        json_schema_extra=traits(change="base"),
    )
    train_data: Annotated[DataNames, BeforeValidator(names_of_data)] = Field(
        description="Training data: a file, a folder, a glob or a hub name (`org/name:split`), "
        "or a list of them, each a name or `{path, weight, limit}`: `weight` is how often its "
        "rows are seen in an epoch (1), `limit` takes its first rows.",
        json_schema_extra=traits(
            change="files",
            is_path=True,
            peers="datasets dataset dataset_name dataset_path train_file train_dataset data_path "
            "training_data train_path",
        ),
    )
    eval_data: Annotated[
        DataNames | Annotated[float, Field(gt=0, lt=1)] | Positive | None,
        BeforeValidator(names_or_amount),
    ] = Field(
        default=None,
        description="Held-out data, named as in `train_data`; or how much of the training data "
        "to hold out, selected by content: a share (`0.05`) or a number of rows (`200`).",
        json_schema_extra=traits(
            change="files",
            is_path=True,
            peers="eval_dataset test_datasets val_dataset validation_file eval_file eval_path",
        ),
    )
    data_format: DataFormat | Auto = Field(
        default="auto",
        description="Format of the rows; `auto` detects it from the columns of each row.",
        json_schema_extra=traits(change="documents", peers="formatting data_type"),
    )
    columns: Annotated[dict[str, str], AfterValidator(columns_of_a_format)] = Field(
        default_factory=dict,
        description="Names that the data has for the columns of its format, for example "
        "`{prompt: question, completion: answer}`.",
        json_schema_extra=traits(change="documents", peers="column_mapping"),
    )
    on_bad_row: Literal["reject", "fail"] = Field(
        default="reject",
        description="`reject` counts a bad row and leaves it out, `fail` ends at the first one.",
        json_schema_extra=traits(change="run"),
    )
    max_rejected: Share = Field(
        default=0.01,
        description="Largest share of bad rows that a source may have; more end the run.",
        json_schema_extra=traits(change="run"),
    )
    max_length: Positive = Field(
        default=1024,
        description="Longest sequence in tokens; also the size of a pack.",
        json_schema_extra=traits(
            change="documents",
            peers="sequence_len cutoff_len max_seq_length max_seq_len model_max_length block_size "
            "seq_length",
        ),
    )
    over_length: Literal["truncate", "drop", "split", "fail"] = Field(
        default="truncate",
        description="A document of more than `max_length` tokens is truncated, dropped, split "
        "into several, or ends the run.",
        json_schema_extra=traits(
            change="documents", peers="truncation_strategy excess_length_strategy"
        ),
    )
    packing: bool = Field(
        default=True,
        description="Concatenate whole documents in sequences of `max_length` tokens; documents "
        "do not attend to each other. `batch_size` and `global_batch_size` then count packs. "
        "Left out, it is false where the model class mixes packed documents; the plan says so.",
        json_schema_extra=traits(
            change="documents", peers="sample_packing neat_packing padding_free"
        ),
    )
    train_on: Literal["assistant", "last-assistant", "all"] = Field(
        default="assistant",
        description="Turns of a conversation that count in the loss; messages of `weight: 0` "
        "never do.",
        json_schema_extra=traits(change="documents"),
    )
    split_turns: bool = Field(
        default=False,
        description="Make a document of each assistant turn with the turns before it, for "
        "templates that rewrite earlier turns.",
        json_schema_extra=traits(change="documents"),
    )
    train_on_reasoning: bool = Field(
        default=True,
        description="Whether the reasoning in trained turns counts in the loss; if not, it is "
        "only read.",
        json_schema_extra=traits(change="documents"),
    )
    special_tokens_in_text: Literal["keep", "reject", "as-text"] = Field(
        default="keep",
        description="What happens to special tokens that stand in the texts of a conversation: "
        "they are special tokens and the audit counts them, the row is rejected, or they are "
        "tokenised as ordinary text.",
        json_schema_extra=traits(change="documents"),
    )
    chat_template: Annotated[str, AfterValidator(template_name)] = Field(
        default="model",
        description="The model's own, a Jinja file (`FILE.jinja`), or `chatml` for a model without "
        "a chat template; then turns end with its end-of-sequence token.",
        json_schema_extra=traits(
            change="documents",
            is_path=True,
            peers="template chat_template_path chat_template_jinja",
        ),
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(template_variables)] = Field(
        default_factory=dict,
        description="Variables for the chat template, for example `{enable_thinking: false}`, "
        "`{reasoning_effort: high}` or `{date_string: 26 Jul 2024}`.",
        json_schema_extra=traits(change="documents"),
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code from the model folder."
    )

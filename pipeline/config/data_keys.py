"""DataKeys: the settings of the base model and the data, with type, default and description."""

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
    check_chat_template,
    check_columns,
    check_template_kwargs,
    parse_eval_data,
    parse_train_data,
)
from pipeline.config.traits import traits

Auto = Literal["auto"]
Share = Annotated[float, Field(ge=0, le=1)]


class DataKeys(BaseModel):
    """Settings of the base model, the data and the tokenisation."""

    model: Annotated[str, Field(min_length=1)] = Field(
        description="Base model: a folder with config.json, safetensors and tokenizer, or the "
        "name of a hub model in the local cache.",
        json_schema_extra=traits(
            change="base",
            is_path=True,
            peers="base_model model_name_or_path model_name model_id model_id_or_path "
            "pretrained_model_name_or_path",
        ),
    )
    model_revision: str | None = Field(
        default=None,
        description="Commit, branch or tag of a hub model; default `main`. run.yaml records the "
        "commit.",
        json_schema_extra=traits(change="base"),
    )
    train_data: Annotated[DataNames, BeforeValidator(parse_train_data)] = Field(
        description="Training data: a file, a folder, a glob or a hub name (`org/name:split`), "
        "or a list of them. An item of the list is a name or `{path, weight, limit}`: `weight` "
        "(default 1) is the number of times that each row is seen in an epoch, `limit` the number "
        "of rows to read.",
        json_schema_extra=traits(
            change="files",
            is_path=True,
            peers="datasets dataset dataset_name dataset_path train_file train_dataset data_path "
            "training_data train_path",
        ),
    )
    eval_data: Annotated[
        DataNames | Annotated[float, Field(gt=0, lt=1)] | Positive | None,
        BeforeValidator(parse_eval_data),
    ] = Field(
        default=None,
        description="Held-out data, named as in `train_data`; or the part of the training data "
        "to hold out: a share (`0.05`) or a number of rows (`200`), selected by a hash of their "
        "content.",
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
    columns: Annotated[dict[str, str], AfterValidator(check_columns)] = Field(
        default_factory=dict,
        description="Columns that have other names in the data than in the format: name in the "
        "format -> name in the data, for example `{prompt: question, completion: answer}`.",
        json_schema_extra=traits(change="documents", peers="column_mapping"),
    )
    on_bad_row: Literal["reject", "fail"] = Field(
        default="reject",
        description="`reject` skips and counts bad rows; `fail` ends the run at the first one.",
        json_schema_extra=traits(change="run"),
    )
    max_rejected: Share = Field(
        default=0.01,
        description="Largest allowed share of bad rows in a source; with more, the run ends.",
        json_schema_extra=traits(change="run"),
    )
    max_length: Positive = Field(
        default=1024,
        description="Maximum sequence length in tokens; also the size of a pack.",
        json_schema_extra=traits(
            change="documents",
            peers="sequence_len cutoff_len max_seq_length max_seq_len model_max_length block_size "
            "seq_length",
        ),
    )
    over_length: Literal["truncate", "drop", "split", "fail"] = Field(
        default="truncate",
        description="A document of more than `max_length` tokens is truncated, dropped, or split "
        "into several documents; `fail` ends the run.",
        json_schema_extra=traits(
            change="documents", peers="truncation_strategy excess_length_strategy"
        ),
    )
    packing: bool = Field(
        default=True,
        description="Concatenate whole documents into packs of at most `max_length` tokens, "
        "without attention between documents. `batch_size` and `global_batch_size` then count "
        "packs. If the model class cannot keep packed documents separate, the default is false; "
        "the plan reports this.",
        json_schema_extra=traits(
            change="documents", peers="sample_packing neat_packing padding_free"
        ),
    )
    train_on: Literal["assistant", "last-assistant", "all"] = Field(
        default="assistant",
        description="Turns of a conversation that count in the loss; messages with `weight: 0` "
        "never count.",
        json_schema_extra=traits(change="documents"),
    )
    split_turns: bool = Field(
        default=False,
        description="Make a separate document for each trained turn, which ends with that turn and "
        "contains all messages before it. Needed if the chat template renders a turn differently "
        "once another follows.",
        json_schema_extra=traits(change="documents"),
    )
    train_on_reasoning: bool = Field(
        default=True,
        description="Whether the reasoning in trained turns counts in the loss; if not, it is "
        "only context.",
        json_schema_extra=traits(change="documents"),
    )
    special_tokens_in_text: Literal["keep", "reject", "as-text"] = Field(
        default="keep",
        description="Treatment of special tokens that are written in a message, such as "
        "`</s>`: `keep` tokenises each as the special token, and the audit counts them; "
        "`reject` rejects the row; `as-text` tokenises them as ordinary text.",
        json_schema_extra=traits(change="documents"),
    )
    chat_template: Annotated[str, AfterValidator(check_chat_template)] = Field(
        default="model",
        description="Chat template: `model` for the template of the model, the path of a Jinja "
        "file (`FILE.jinja`), or `chatml` for a model without one. With `chatml`, turns end with "
        "the model's end-of-sequence token.",
        json_schema_extra=traits(
            change="documents",
            is_path=True,
            peers="template chat_template_path chat_template_jinja",
        ),
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(check_template_kwargs)] = Field(
        default_factory=dict,
        description="Variables for the chat template, for example `{enable_thinking: false}`, "
        "`{reasoning_effort: high}` or `{date_string: 26 Jul 2024}`.",
        json_schema_extra=traits(change="documents"),
    )
    trust_remote_code: bool = Field(
        default=False, description="Allow Python code from the model folder to run."
    )

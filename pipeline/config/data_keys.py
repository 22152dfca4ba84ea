"""DataKeys: settings of the base model, the data and the tokenisation.

Each Field has the type, the default and the description of one setting. `traits(...)` adds facts
such as its names in other training programs (`peers`); traits.py explains them.
"""

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
    """Settings that determine the base model and the training documents."""

    model: Annotated[str, Field(min_length=1)] = Field(
        description="Base model: a folder with config.json, safetensors files and a tokenizer, or "
        "the name of a hub model in the local cache.",
        json_schema_extra=traits(
            change="base",
            is_path=True,
            peers="base_model model_name_or_path model_name model_id model_id_or_path "
            "pretrained_model_name_or_path",
        ),
    )
    model_revision: str | None = Field(
        default=None,
        description="Commit, branch or tag of a hub model; without it `main`. The run folder's "
        "run.yaml records the commit.",
        json_schema_extra=traits(change="base", peers="revision"),
    )
    train_data: Annotated[DataNames, BeforeValidator(parse_train_data)] = Field(
        description="Training data: a file, a folder, a glob or a hub name (`org/name:split`), or "
        "a list of these. `{path: ..., weight: W, limit: N}` in place of a name reads only the "
        "first N rows and uses each row W times per epoch (default 1; fractions are allowed).",
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
        description="Held-out data: files or data sets, named as in `train_data`; or a share "
        "(`0.05`) or a number (`200`) of the training rows. A hash of each row's content decides "
        "whether the row is held out.",
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
        description="Names of the format's columns in your data, if they differ: `{prompt: "
        "question, completion: answer}` reads the column `question` as `prompt` and `answer` as "
        "`completion`.",
        json_schema_extra=traits(change="documents", peers="column_mapping"),
    )
    on_bad_row: Literal["reject", "fail"] = Field(
        default="reject",
        description="`reject` skips bad rows, and the audit counts them; `fail` ends the run at "
        "the first bad row.",
        json_schema_extra=traits(change="run"),
    )
    max_rejected: Share = Field(
        default=0.01,
        description="Largest allowed share of bad rows in a source. If it is exceeded, the run "
        "ends.",
        json_schema_extra=traits(needs="on_bad_row=reject", change="run"),
    )
    max_length: Positive = Field(
        default=1024,
        description="Maximum sequence length in tokens; also the size of a pack.",
        json_schema_extra=traits(
            change="documents",
            peers="sequence_len cutoff_len max_seq_length max_seq_len model_max_length block_size "
            "seq_length packing_length",
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
        "packs. For a model class that cannot keep packed documents separate, the default is "
        "false, and the plan says so.",
        json_schema_extra=traits(change="documents", peers="sample_packing neat_packing"),
    )
    train_on: Literal["assistant", "last-assistant", "all"] = Field(
        default="assistant",
        description="Tokens that count in the loss: all assistant turns (`assistant`), only the "
        "last assistant turn (`last-assistant`), or the whole document (`all`). Messages with "
        "`weight: 0` never count.",
        json_schema_extra=traits(needs="data_format!=text|pre-tokenised", change="documents"),
    )
    split_turns: bool = Field(
        default=False,
        description="Make one document for each trained turn: the turn and all messages before it. "
        "Needed if the chat template renders the last turn of a conversation differently from "
        "earlier ones.",
        json_schema_extra=traits(needs="data_format!=text|pre-tokenised", change="documents"),
    )
    train_on_reasoning: bool = Field(
        default=True,
        description="Whether the reasoning in trained turns counts in the loss. If false, it stays "
        "in the document as context.",
        json_schema_extra=traits(needs="data_format!=text|pre-tokenised", change="documents"),
    )
    special_tokens_in_text: Literal["keep", "reject", "as-text"] = Field(
        default="keep",
        description="How to treat a special token, such as `</s>`, in the text of a row. `keep` "
        "tokenises it as the special token, and the audit counts it; `reject` rejects the row; "
        "`as-text` tokenises its characters as ordinary text.",
        json_schema_extra=traits(needs="data_format!=pre-tokenised", change="documents"),
    )
    chat_template: Annotated[str, AfterValidator(check_chat_template)] = Field(
        default="model",
        description="Chat template: `model` (the model's own), the path of a Jinja file "
        "(`FILE.jinja`), or `chatml` for a model without a template. With `chatml`, turns end with "
        "the model's end-of-sequence token.",
        json_schema_extra=traits(
            needs="data_format!=text|pre-tokenised",
            change="documents",
            is_path=True,
            peers="template chat_template_path chat_template_jinja",
        ),
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(check_template_kwargs)] = Field(
        default_factory=dict,
        description="Variables for the chat template, for example `{enable_thinking: false}`, "
        "`{reasoning_effort: high}` or `{date_string: 26 Jul 2024}`.",
        json_schema_extra=traits(needs="data_format!=text|pre-tokenised", change="documents"),
    )
    trust_remote_code: bool = Field(
        default=False, description="Allow Python code from the model folder to run."
    )

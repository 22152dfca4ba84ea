"""AdapterKeys: settings of LoRA variants, such as rsLoRA and DoRA, and exceptions for some layers.

A run resumes only from a checkpoint with the same values of these settings. The adapter's README.md
lists the settings that differ from their defaults. `traits(...)` adds facts about a setting, such
as its names in other training programs (`peers`); traits.py explains them.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from pipeline.config.data_names import Positive
from pipeline.config.traits import traits

# Value of init_lora_weights in peft 0.21.2 that is not supported here -> the reason.
_UNSUPPORTED_INITIAL_VALUES = {
    "corda": "it needs a forward pass over the data before ZeRO shards the model",
}


def _supported_initial_values(value: object) -> object:
    """Return a value of `init_lora_weights`, or raise ValueError if only peft supports it."""
    if isinstance(value, str) and value in _UNSUPPORTED_INITIAL_VALUES:
        reason = _UNSUPPORTED_INITIAL_VALUES[value]
        raise ValueError(
            f"{value} is not supported: {reason}; set true, gaussian, pissa, olora, eva or loftq"
        )
    return value


class AdapterKeys(BaseModel):
    """Adapter settings other than r, alpha, dropout and target modules."""

    @field_validator("new_tokens")
    @classmethod
    def _check_new_tokens(cls, value: list[str]) -> list[str]:
        if repeated := [token for token in value if value.count(token) > 1]:
            raise ValueError(f"{repeated[0]!r} is in the list more than once; remove one of them")
        return value

    use_rslora: bool = Field(
        default=False,
        description="Rank-stabilised LoRA: scale the adapter's output by `lora_alpha` / "
        "sqrt(`lora_r`) instead of `lora_alpha` / `lora_r`.",
        json_schema_extra=traits(peers="peft_use_rslora rslora"),
    )
    use_dora: bool = Field(
        default=False,
        description="DoRA: also train the magnitude of each row of an adapted weight. Training is "
        "slower, because each forward pass computes the norms of the whole weight. Not available "
        "at ZeRO-3.",
        json_schema_extra=traits(peers="peft_use_dora lora_use_dora"),
    )
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict,
        description="A different `lora_r` for some layers, for example `{q_proj: 16}`. A key is a "
        "regular expression that matches the end of a layer's name. If several keys match, the "
        "first one applies.",
        json_schema_extra=traits(peers="lora_rank_pattern"),
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        default_factory=dict,
        description="A different `lora_alpha` for some layers, with keys as in `rank_pattern`.",
        json_schema_extra=traits(peers="lora_alpha_pattern"),
    )
    layers_to_transform: list[int] = Field(
        default_factory=list,
        description="Indices of the transformer blocks whose layers get an adapter, counted from "
        "0. An empty list means all blocks.",
        json_schema_extra=traits(peers="lora_layers_to_transform peft_layers_to_transform"),
    )
    exclude_modules: str | list[str] = Field(
        default_factory=list,
        description="Layers of `lora_target_modules` that get no adapter: a list of module names "
        "(full paths or their last parts), or one regular expression that matches full paths.",
        json_schema_extra=traits(peers="lora_exclude_modules"),
    )
    init_lora_weights: Annotated[
        Literal[True, "gaussian", "pissa", "olora", "eva", "loftq"]
        | Annotated[str, Field(pattern="^pissa_niter_[1-9][0-9]?$")],
        BeforeValidator(_supported_initial_values),
    ] = Field(
        default=True,
        description="Initial values of A and B. With the first three, B starts at zero. `true`: "
        "Kaiming-uniform, as in the LoRA paper's code. `gaussian`: normal, with standard deviation "
        "1 / r. `eva`: the principal directions of each layer's inputs, on training data. `pissa`, "
        "`olora`: the principal part of each weight by SVD or QR, which is subtracted from the "
        "base in memory; the saved adapter has twice the r and belongs to the unchanged base. "
        "`pissa_niter_16`: PiSSA by a faster, approximate SVD of 16 iterations. `loftq`: a "
        "correction of the errors of `load_in_4bit`, by SVD; the saved adapter belongs to the "
        "4-bit base.",
        json_schema_extra=traits(
            needs="!init_adapter", peers="peft_init_lora_weights init_weights"
        ),
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="Modules that are trained in full, in addition to the adapter: embeddings "
        "(`embed_tokens`) and head (`lm_head`). If they share their weight, they are trained as "
        "one and stay equal. Each parameter takes about 16 bytes over all ranks.",
        json_schema_extra=traits(
            peers="lora_modules_to_save additional_target additional_trainable_modules"
        ),
    )
    new_tokens: list[Annotated[str, Field(min_length=1, pattern=r"\S")]] = Field(
        default_factory=list,
        description="Texts that become single tokens, for example `[<tool>, </tool>]`. They are "
        "added to the tokenizer, and each gets a trained row in embeddings and head. Spare rows of "
        "the model are used first; then rows are added. A row starts at the mean of all rows with "
        "some noise, which depends on `seed`.",
        json_schema_extra=traits(peers="tokens"),
    )
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1e6)] = Field(
        default=1.0,
        description="LoRA+: the learning rate of the B matrices divided by `lr`, for example 16. "
        "With 1, all matrices have the same learning rate. With another value, metrics.jsonl has "
        "both rates: `lr` and `lr_lora_b`.",
        json_schema_extra=traits(peers="loraplus_lr_ratio lorap_lr_ratio"),
    )
    neftune_noise_alpha: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0,
        description="NEFTune: add uniform noise to the token embeddings in training. The largest "
        "noise is this value, for example 5, divided by sqrt(tokens of the document x hidden "
        "size). 0 adds none.",
        json_schema_extra=traits(peers="noisy_embedding_alpha neftune_alpha"),
    )

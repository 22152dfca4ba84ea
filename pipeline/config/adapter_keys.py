"""AdapterKeys: adapter settings for variants and extensions of plain LoRA.

They are part of a checkpoint's identity, and the card of an adapter names those that are set.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from pipeline.config.data_names import Positive
from pipeline.config.traits import traits


class AdapterKeys(BaseModel):
    """Adapter settings other than r, alpha, dropout and target modules."""

    use_rslora: bool = Field(
        default=False,
        description="Rank-stabilised LoRA: scale the adapter's output by `lora_alpha` / the square "
        "root of `lora_r`.",
        json_schema_extra=traits(peers="peft_use_rslora rslora"),
    )
    use_dora: bool = Field(
        default=False,
        description="DoRA: train the magnitude of each row of an adapted weight too. Slower, "
        "because each forward pass computes the norms of the whole weight; not at ZeRO-3.",
        json_schema_extra=traits(peers="peft_use_dora lora_use_dora"),
    )
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict,
        description="Another `lora_r` for some layers, for example `{q_proj: 16}`: a key is a "
        "regular expression for the end of a layer's name, and the first match counts.",
        json_schema_extra=traits(peers="lora_rank_pattern"),
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        default_factory=dict,
        description="Another `lora_alpha` for some layers, with keys as in `rank_pattern`.",
        json_schema_extra=traits(peers="lora_alpha_pattern"),
    )
    layers_to_transform: list[int] = Field(
        default_factory=list,
        description="Indices of the blocks whose layers get an adapter, from 0; empty for all.",
        json_schema_extra=traits(peers="lora_layers_to_transform peft_layers_to_transform"),
    )
    exclude_modules: str | list[str] = Field(
        default_factory=list,
        description="Layers of `lora_target_modules` that get no adapter: a list of module names "
        "(the end of the path is enough), or one regular expression for the whole path.",
        json_schema_extra=traits(peers="lora_exclude_modules"),
    )
    init_lora_weights: Literal[True, "gaussian"] = Field(
        default=True,
        description="Initial values of A; B is zero: `true` as in the LoRA paper's code "
        "(Kaiming-uniform), `gaussian` normal with standard deviation 1 / r.",
        json_schema_extra=traits(peers="peft_init_lora_weights"),
    )
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1e6)] = Field(
        default=1.0,
        description="LoRA+: the learning rate of the B matrices as a multiple of `lr`, such as 16; "
        "1 for one rate. metrics.jsonl then has both, as `lr` and `lr_lora_b`.",
        json_schema_extra=traits(peers="loraplus_lr_ratio lorap_lr_ratio"),
    )
    neftune_noise_alpha: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0,
        description="NEFTune: noise on the embeddings in training, uniform within this / "
        "sqrt(tokens of the document x hidden size), such as 5; 0 for none.",
        json_schema_extra=traits(peers="noisy_embedding_alpha neftune_alpha"),
    )

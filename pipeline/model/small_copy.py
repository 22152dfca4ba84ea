"""Small random copies of a model: the same class, with few blocks, at least one of each kind.

proof.py checks a copy instead of the model, because both run the same code. The widths of a copy
are reduced too, unless its class cannot be built with reduced widths.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

_BLOCKS = 4  # least number of blocks, if a copy has reduced widths
_WIDE_BLOCKS = 2  # the same, if it has the widths of the model
_WINDOW = 5  # tokens; shorter than the documents of the checks, so that windows have an effect
# Standard deviation of random matrices: large enough for scales, soft caps and attention to matter.
_STD = 0.12
# Keys that a decoder's config may have -> reduced sizes. The ratio of query to key heads is kept.
_WIDTHS = {
    "hidden_size": 64, "intermediate_size": 128, "intermediate_size_mlp": 128, "head_dim": 16,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "global_head_dim": 32,
    "moe_shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "hidden_size_per_layer_input": 64, "laurel_rank": 64,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "mamba_d_state": 16, "mamba_d_head": 32, "mamba_n_heads": 4,
    "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2,
    "mamba_d_ssm": 128, "linear_head_dim": 16, "linear_num_heads": 4, "mamba_dt_rank": 4,
}  # fmt: skip
_VISION_WIDTHS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_heads": 2, "num_key_value_heads": 2, "depth": 2, "head_dim": 16, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32,
    "projector_output_dim": 32, "out_hidden_size": 64,
}  # fmt: skip
# Keys for numbers of experts, blocks and positions -> largest values in a copy.
_COUNTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "num_kv_shared_layers": 2,
    "num_nextn_predict_layers": 0, "max_position_embeddings": 256,
}  # fmt: skip
_WINDOW_KEYS = ("sliding_window", "attention_chunk_size")
_VOCABULARY = 512
_MAX_PARAMETERS = 3e8  # limits host memory: the checks hold several copies in fp32


def small_copies(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Three configs to try, from small to large.

    In the first all sizes are reduced, and there is one block of each kind. The second has two of
    each kind, because blocks may share weights (Zamba). The third has the widths of the model; only
    its blocks, experts and vocabulary are reduced.
    """
    text_config = config.get_text_config()
    name = next((key for key, value in vars(config).items() if value is text_config), None)
    reduced: tuple[Mapping[str, int], Mapping[str, int]] = (_WIDTHS, _VISION_WIDTHS)
    for (widths, vision), repeats in ((reduced, 1), (reduced, 2), (({}, {}), 1)):
        values = config.to_dict()
        text = values if name is None else values[name]
        _reduce(text, widths, text_config.attribute_map, repeats)
        for other in values.values():
            if isinstance(other, dict) and "model_type" in other and other is not text:
                _lower_to(other, vision)
        if widths and name is not None:  # the sections of multimodal rope must sum to head_dim / 2
            text["rope_parameters"] = (text.get("rope_parameters") or {}) | {
                "mrope_section": [4, 2, 2]
            }
        yield type(config).from_dict(values)


def random_model(auto_class: Any, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Build a model in fp32 on the CPU, in eval mode; its weights depend only on the config."""
    with torch.device("meta"):
        size = sum(p.numel() for p in auto_class.from_config(config, **options).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"the smallest copy has {size / 1e6:,.0f} M parameters")
    generator = torch.Generator().manual_seed(0)
    model = auto_class.from_config(config, dtype=torch.float32, **options)
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty_like(parameter).normal_(std=_STD, generator=generator)
            # Vectors keep their initial values as a mean: norms, biases, decays. Zeros among them
            # (Gemma 3n's scales) would stop gradients that a trained model has.
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.train(False)
    return model


def _reduce(
    text: dict[str, Any], widths: Mapping[str, int], own_names: Mapping[str, str], repeats: int
) -> None:
    """Reduce the sizes of a decoder's config in place; `own_names`: config's attribute_map."""
    for name, own in own_names.items():
        if own in text:
            text[name] = text.pop(own)
    if widths and text.get("num_attention_heads"):
        _reduce_heads(text, widths)
    _lower_to(text, _COUNTS)
    for key in _WINDOW_KEYS:
        if text.get(key):
            text[key] = _WINDOW
    _reduce_vocabulary(text)
    _choose_blocks(text, _BLOCKS if widths else _WIDE_BLOCKS, repeats)
    for name, own in own_names.items():
        if name in text:
            text[own] = text.pop(name)


def _reduce_heads(text: dict[str, Any], widths: Mapping[str, int]) -> None:
    heads, head_dim = text["num_attention_heads"], text.get("head_dim")
    keys = text.get("num_key_value_heads") or heads
    rope_dim = text.get("qk_rope_head_dim")
    text["num_attention_heads"] = 4
    if text.get("num_key_value_heads") is not None:
        text["num_key_value_heads"] = max(1, 4 * keys // heads)
    if text.get("num_global_key_value_heads"):
        text["num_global_key_value_heads"] = 1
    _lower_to(text, widths)
    for key in widths.keys() & text.keys():  # exact sizes, because several must agree
        if isinstance(text[key], int) and text[key] > 0:
            text[key] = widths[key]
    if head_dim is not None and head_dim == rope_dim:  # DeepSeek: both are the rotated width
        text["head_dim"] = text["qk_rope_head_dim"]
    _shorten_rope_factors(text)


def _shorten_rope_factors(text: dict[str, Any]) -> None:
    """Shorten the lists of longrope, which have a factor for each rotated pair of a head."""
    rope = text.get("rope_parameters") or {}
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    share = rope.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 1
    rotated = text.get("qk_rope_head_dim") or int(head_dim * share)
    for key in ("short_factor", "long_factor"):
        if isinstance(rope.get(key), list):
            rope[key] = rope[key][: rotated // 2]


def _lower_to(values: dict[str, Any], limits: Mapping[str, int]) -> None:
    """Lower the values of these keys to the limits; in a list, lower every entry."""
    for key, limit in limits.items():
        present = values.get(key)
        if isinstance(present, list):
            values[key] = [min(limit, entry) for entry in present]
        elif isinstance(present, int) and not isinstance(present, bool) and present > limit:
            values[key] = limit


def _reduce_vocabulary(text: dict[str, Any]) -> None:
    for key in ("vocab_size", "vocab_size_per_layer_input"):
        if (text.get(key) or 0) > _VOCABULARY:
            text[key] = _VOCABULARY
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if text.get(key) is not None:
            text[key] = 0


def _choose_blocks(text: dict[str, Any], least: int, repeats: int) -> None:
    """Keep the first `repeats` blocks of each kind, but at least `least` blocks.

    Lists with one entry per block, and lists of block indices, are changed accordingly.
    """
    total = text.get("num_hidden_layers") or len(text.get("layers_block_type", ()))
    if total <= least:
        return
    indices = {key: value for key, value in text.items() if _are_indices(value, total)}
    kinds = {
        key: value
        for key, value in text.items()
        if isinstance(value, list) and len(value) == total and key not in indices
    }
    kind_of_block = [str([v[i] for v in kinds.values()] + [i in v for v in indices.values()])
                for i in range(total)]  # fmt: skip
    chosen = [i for i, kind in enumerate(kind_of_block) if kind_of_block[:i].count(kind) < repeats]
    if text.get("num_kv_shared_layers"):  # blocks that share keys and values must come last
        chosen, text["num_kv_shared_layers"] = chosen * 2, len(chosen)
    else:
        others = [i for i in range(total) if i not in chosen]
        chosen = sorted(chosen + others[: max(0, least - len(chosen))])
    for key, value in kinds.items():
        text[key] = [value[i] for i in chosen]
    for key, value in indices.items():
        text[key] = [position for position, i in enumerate(chosen) if i in value]
    if "num_hidden_layers" in text:
        text["num_hidden_layers"] = len(chosen)
    if overrides := text.get("per_layer_config"):  # Gemma 4: some blocks have other widths
        by_block = {int(i): dict(values) for i, values in overrides.items()}
        for values in by_block.values():
            _lower_to(values, {"head_dim": 2 * text["head_dim"], "num_key_value_heads": 1})
        text["per_layer_config"] = {
            position: by_block[i] for position, i in enumerate(chosen) if i in by_block
        }


def _are_indices(value: Any, total: int) -> bool:
    """Whether a value is a list of block indices: ascending integers below `total`."""
    is_list = isinstance(value, list) and all(type(entry) is int for entry in value)
    return is_list and value == sorted(set(value)) and (not value or 0 <= value[-1] < total)

"""Small random copies of a model: the same class, with few blocks, at least one of each kind.

proof.py checks a copy instead of the model, because both run the same code. The widths of a copy
are reduced too, unless its class does not run with reduced widths. A kind of block is, for example,
a block with sliding attention, or a block with experts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

_MIN_BLOCKS = 4  # least number of blocks of a copy with reduced widths
_MIN_WIDE_BLOCKS = 2  # least number of blocks of a copy with the widths of the model
_WINDOW = 5  # tokens; shorter than the documents of the checks, so that windows have an effect
# Standard deviation of random matrices: large enough for scales, soft caps and attention to matter.
_STD = 0.12
# Keys that a decoder's config may have -> reduced sizes. `_reduce_heads` reduces the numbers of
# heads.
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
# The same for the config of a vision tower and of other parts.
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
    # In a multimodal model, the decoder's config is an entry of the model's config, such as
    # `text_config`. In a text model, both are the same.
    text_key = next((key for key, value in vars(config).items() if value is text_config), None)
    for has_reduced_widths, blocks_per_kind in ((True, 1), (True, 2), (False, 1)):
        values = config.to_dict()
        text = values if text_key is None else values[text_key]
        _reduce(
            text, _WIDTHS if has_reduced_widths else {}, text_config.attribute_map, blocks_per_kind
        )
        if has_reduced_widths:
            for part in values.values():
                if isinstance(part, dict) and "model_type" in part and part is not text:
                    _lower_to(part, _VISION_WIDTHS)
        if has_reduced_widths and text_key is not None:
            # the sections of multimodal rope must sum to head_dim / 2
            rope = text.get("rope_parameters") or {}
            text["rope_parameters"] = rope | {"mrope_section": [4, 2, 2]}
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
            # Noise is added to vectors (norms, biases, decays), so that their initial values remain
            # their means. Without noise, those that start at 0 (Gemma 3n's scales) would stop
            # gradients that a trained model has.
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.train(False)
    return model


def _reduce(
    text: dict[str, Any],
    widths: Mapping[str, int],
    attribute_map: Mapping[str, str],
    blocks_per_kind: int,
) -> None:
    """Reduce the sizes of a decoder's config in place.

    `attribute_map`: usual name of a key -> its name in this class of config, such as hidden_size ->
    n_embd. Keys have their usual names while they are reduced.
    """
    for usual_name, name in attribute_map.items():
        if name in text:
            text[usual_name] = text.pop(name)
    if widths and text.get("num_attention_heads"):
        _reduce_heads(text, widths)
    _lower_to(text, _COUNTS)
    for key in _WINDOW_KEYS:
        if text.get(key):
            text[key] = _WINDOW
    _reduce_vocabulary(text)
    _choose_blocks(text, _MIN_BLOCKS if widths else _MIN_WIDE_BLOCKS, blocks_per_kind)
    for usual_name, name in attribute_map.items():
        if usual_name in text:
            text[name] = text.pop(usual_name)


def _reduce_heads(text: dict[str, Any], widths: Mapping[str, int]) -> None:
    """Reduce numbers and widths of heads, with about the same ratio of query heads to key heads."""
    num_heads, head_dim = text["num_attention_heads"], text.get("head_dim")
    num_key_heads = text.get("num_key_value_heads") or num_heads
    rope_dim = text.get("qk_rope_head_dim")
    text["num_attention_heads"] = 4
    if text.get("num_key_value_heads") is not None:
        text["num_key_value_heads"] = max(1, 4 * num_key_heads // num_heads)
    if text.get("num_global_key_value_heads"):
        text["num_global_key_value_heads"] = 1
    _lower_to(text, widths)
    for key in widths.keys() & text.keys():  # also raise smaller sizes, because several must agree
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
        value = values.get(key)
        if isinstance(value, list):
            values[key] = [min(limit, entry) for entry in value]
        elif isinstance(value, int) and not isinstance(value, bool) and value > limit:
            values[key] = limit


def _reduce_vocabulary(text: dict[str, Any]) -> None:
    """Reduce the vocabulary, and set special tokens to id 0, which it still has."""
    for key in ("vocab_size", "vocab_size_per_layer_input"):
        if (text.get(key) or 0) > _VOCABULARY:
            text[key] = _VOCABULARY
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if text.get(key) is not None:
            text[key] = 0


def _choose_blocks(text: dict[str, Any], min_blocks: int, blocks_per_kind: int) -> None:
    """Keep the first `blocks_per_kind` blocks of each kind, but at least `min_blocks` blocks.

    The config may have lists with one entry per block, such as `layer_types`, and lists of block
    indices, such as `mlp_only_layers`. They determine the kind of each block, and are shortened.
    """
    total = text.get("num_hidden_layers") or len(text.get("layers_block_type", ()))
    if total <= min_blocks:
        return
    index_lists = {key: value for key, value in text.items() if _are_indices(value, total)}
    lists_by_block = {
        key: value
        for key, value in text.items()
        if isinstance(value, list) and len(value) == total and key not in index_lists
    }
    kinds: list[str] = []  # of each block
    for i in range(total):
        entries = [value[i] for value in lists_by_block.values()]
        entries += [i in value for value in index_lists.values()]
        kinds.append(str(entries))
    chosen = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < blocks_per_kind]
    if text.get("num_kv_shared_layers"):
        # The last blocks use the keys and values of earlier blocks of their kind. So each chosen
        # block is there twice: with keys and values of its own, and with shared ones.
        chosen, text["num_kv_shared_layers"] = chosen * 2, len(chosen)
    else:
        others = [i for i in range(total) if i not in chosen]
        chosen = sorted(chosen + others[: max(0, min_blocks - len(chosen))])
    for key, value in lists_by_block.items():
        text[key] = [value[i] for i in chosen]
    for key, value in index_lists.items():
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

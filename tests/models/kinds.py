"""ALL: small configs of all model kinds of matrix.py: those of tests/model/kinds.py, and others.

They have at least one kind for each row of RANKED in docs/model_tables.py, and variants of a config
that change the computation (rope types, shared keys, tied embeddings, a bidirectional mask).
"""

# ruff: noqa: C408, E501 - configs as keyword arguments, one kind a line
# fmt: off
from tests.model.kinds import (
    EXPERTS,
    HYBRID,
    KINDS,
    QUANTISED_CHECKPOINTS,
    SLIDING,
    VISION,
    VOCABULARY,
    small,
)

MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2]))
LONGROPE = dict(
    max_position_embeddings=1024, original_max_position_embeddings=256,
    rope_parameters=dict(
        rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 8, long_factor=[2.0] * 8,
        original_max_position_embeddings=256,
    ),
)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
GROUPED = dict(ROUTED, n_shared_experts=1, n_group=1, topk_group=1)
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16,
)
FLAT = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SHARING = ["sliding_attention", "full_attention"] * 2

MORE_KINDS = {
    "llama/tied": ("llama", small(tie_word_embeddings=True)),
    "gemma": ("gemma", small(head_dim=16)),
    "phi": ("phi", small()),
    "phi3/longrope": ("phi3", small(sliding_window=None, **LONGROPE)),
    "gpt_neox": ("gpt_neox", small()),
    "qwen2_moe": ("qwen2_moe", small(shared_expert_intermediate_size=64, **EXPERTS)),
    "qwen2_vl": ("qwen2_vl", dict(text_config=small(**MROPE), vision_config=dict(VISION, embed_dim=32, hidden_size=64))),
    "qwen3_vl_moe": ("qwen3_vl_moe", dict(text_config=small(head_dim=16, **EXPERTS, **MROPE), vision_config=dict(VISION, out_hidden_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]))),
    "gemma3_text/bidirectional": ("gemma3_text", small(head_dim=16, sliding_window=5, layer_types=SLIDING, query_pre_attn_scalar=16, use_bidirectional_attention=True)),
    "gemma3n_text/shared": ("gemma3n_text", small(head_dim=16, sliding_window=5, layer_types=SHARING, intermediate_size=[128] * 4, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=64, num_kv_shared_layers=2, laurel_rank=64, activation_sparsity_pattern=[0.0] * 4)),
    "gemma4_unified": ("gemma4_unified", dict(text_config=small(head_dim=16, sliding_window=5, layer_types=SLIDING), image_token_id=258)),
    "mistral3/ministral3": ("mistral3", dict(text_config=dict(small(head_dim=16), model_type="ministral3"), vision_config=dict(VISION, head_dim=16, model_type="pixtral"))),
    "ministral": ("ministral", small(head_dim=16, sliding_window=5, layer_types=SLIDING)),
    "cohere2": ("cohere2", small(logit_scale=0.0625, head_dim=16, sliding_window=5, layer_types=SLIDING)),
    "cohere2_moe": ("cohere2_moe", small(logit_scale=0.0625, head_dim=16, sliding_window=5, layer_types=SLIDING, num_experts=4, num_experts_per_tok=2)),
    "exaone4": ("exaone4", small(head_dim=16, sliding_window=5, sliding_window_pattern=4)),
    "exaone_moe": ("exaone_moe", small(head_dim=16, sliding_window=5, **EXPERTS)),
    "apertus": ("apertus", small()),
    "internlm3": ("internlm3", small()),
    "seed_oss": ("seed_oss", small(head_dim=16, residual_dropout=0.0, attention_dropout=0.0)),
    "ernie4_5": ("ernie4_5", small(head_dim=16)),
    "ernie4_5_moe": ("ernie4_5_moe", small(head_dim=16, moe_num_experts=4, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=1)),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", small(head_dim=16)),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", small(head_dim=16, num_experts=4, moe_topk=2)),
    "hy_v3": ("hy_v3", small(head_dim=16, **EXPERTS)),
    "minicpm3": ("minicpm3", small(**LATENT)),
    "mimo_v2_flash": ("mimo_v2_flash", small(head_dim=16, v_head_dim=16, sliding_window=5, **ROUTED)),
    "laguna": ("laguna", small(head_dim=16, sliding_window=5, **EXPERTS)),
    "granite_swa": ("granite_swa", small(logits_scaling=8.0, sliding_window=5)),
    "granitemoeshared": ("granitemoeshared", small(num_local_experts=4, shared_intermediate_size=64, logits_scaling=8.0)),
    "bamba": ("bamba", small(attn_layer_indices=[1, 3], mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16)),
    "zamba2": ("zamba2", small(mamba_d_state=16, n_mamba_heads=4, num_mem_blocks=1, layers_block_type=["mamba", "mamba", "hybrid", "mamba"], hybrid_layer_ids=[2])),
    "zamba2/shared": ("zamba2", small(mamba_d_state=16, n_mamba_heads=4, num_mem_blocks=1, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], hybrid_layer_ids=[1, 3])),
    "zamba": ("zamba", small(num_hidden_layers=9, mamba_d_state=16, n_mamba_heads=2, num_key_value_heads=4, mamba_dt_rank=4)),
    "got_ocr2": ("got_ocr2", dict(text_config=small(), vision_config=dict(VISION, output_channels=32, mlp_dim=48, window_size=2, global_attn_indexes=[0]))),
    "olmo": ("olmo", small()),
    "olmo_hybrid": ("olmo_hybrid", small(layer_types=HYBRID, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=4, linear_num_value_heads=4)),
    "flex_olmo": ("flex_olmo", small(num_experts=4, num_experts_per_tok=2)),
    "minimax": ("minimax", small(head_dim=16, num_local_experts=4, num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"] * 2, block_size=8)),
    "dots1": ("dots1", small(head_dim=16, first_k_dense_replace=1, **GROUPED)),
    "solar_open": ("solar_open", small(head_dim=16, **GROUPED)),
    "afmoe": ("afmoe", small(head_dim=16, num_dense_layers=1, sliding_window=5, **EXPERTS)),
    "youtu": ("youtu", small(**LATENT)),
    "mellum": ("mellum", small(head_dim=16, **EXPERTS)),
    "jetmoe": ("jetmoe", small(num_local_experts=4, num_experts_per_tok=2, kv_channels=16)),
    "helium": ("helium", small(head_dim=16)),
    "cwm": ("cwm", small(head_dim=16, sliding_window=5)),
    "vaultgemma": ("vaultgemma", small(head_dim=16, sliding_window=5, query_pre_attn_scalar=16)),
    "modernbert-decoder": ("modernbert-decoder", small()),
    "recurrent_gemma": ("recurrent_gemma", small(lru_width=64, attention_window_size=5, block_types=["recurrent", "recurrent", "attention"])),
    "rwkv": ("rwkv", dict(FLAT, hidden_size=64, num_hidden_layers=4, attention_hidden_size=64, intermediate_size=128, context_length=256)),
    "mamba": ("mamba", dict(FLAT, hidden_size=64, num_hidden_layers=4, state_size=16)),
    "opt": ("opt", dict(FLAT, hidden_size=64, ffn_dim=128, num_hidden_layers=4, num_attention_heads=4, word_embed_proj_dim=64, max_position_embeddings=256, dropout=0.0)),
    "bloom": ("bloom", dict(FLAT, hidden_size=64, n_layer=4, n_head=4)),
    "gptj": ("gptj", dict(FLAT, n_embd=64, n_layer=4, n_head=4, rotary_dim=8, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
}
# fmt: on
ALL = KINDS | MORE_KINDS | {name: KINDS[kind] for name, kind in QUANTISED_CHECKPOINTS.items()}

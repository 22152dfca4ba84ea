"""KINDS: small configs of model classes in transformers, on which the tests are fast.

Name of the kind -> model_type, and keys of its config. A name such as `gemma4_text/moe` is a
variant of the model_type before the slash.
"""

# ruff: noqa: C408 - configs as keyword arguments

VOCABULARY = 259  # that of the tests' tokenizer: 256 bytes and 3 special tokens
SMALL = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=256,
    initializer_range=0.2,  # with the usual 0.02, models of this size hardly react to their input
)


def small(**changes):
    """The keys of a small decoder with changes; the value `...` removes a key."""
    return {key: value for key, value in (SMALL | changes).items() if value is not ...}


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
MLA = dict(  # multi-head latent attention
    num_key_value_heads=4,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
)
LINEAR = dict(  # linear attention
    linear_conv_kernel_dim=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    head_dim=16,
)
# Types of the four layers. The kinds that use SLIDING have a window of 5 tokens (sliding_window),
# which is shorter than the sequences of the tests.
HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_heads=2,
    depth=2,
    image_size=28,
    patch_size=14,
)
KINDS = {
    "llama": ("llama", small()),
    "diffllama": ("diffllama", small()),
    "mistral": ("mistral", small(sliding_window=None)),
    "qwen2": ("qwen2", small()),
    "qwen3": ("qwen3", small(head_dim=16)),
    "qwen3_moe": ("qwen3_moe", small(head_dim=16, **EXPERTS)),
    "gemma2": ("gemma2", small(head_dim=16, sliding_window=5, query_pre_attn_scalar=16)),
    "gemma3_text": (
        "gemma3_text",
        small(head_dim=16, sliding_window=5, layer_types=SLIDING, query_pre_attn_scalar=16),
    ),
    "phi3": ("phi3", small(sliding_window=None)),
    "mixtral": ("mixtral", small(num_local_experts=4)),
    "smollm3": ("smollm3", small()),
    "qwen3_5": (
        "qwen3_5",
        dict(
            text_config=small(**LINEAR, layer_types=HYBRID),
            vision_config=dict(VISION, out_hidden_size=64, num_position_embeddings=16),
        ),
    ),
    "qwen3_5_text": ("qwen3_5_text", small(**LINEAR, layer_types=HYBRID)),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        dict(
            text_config=small(
                **LINEAR,
                layer_types=HYBRID,
                intermediate_size=...,
                shared_expert_intermediate_size=64,
                **EXPERTS,
            ),
            vision_config=dict(VISION, out_hidden_size=64, num_position_embeddings=16),
        ),
    ),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        small(
            **LINEAR,
            layer_types=HYBRID,
            intermediate_size=...,
            shared_expert_intermediate_size=64,
            **EXPERTS,
        ),
    ),
    "qwen3_next": (
        "qwen3_next",
        small(**LINEAR, layer_types=HYBRID, shared_expert_intermediate_size=64, **EXPERTS),
    ),
    "qwen3_vl": (
        "qwen3_vl",
        dict(
            text_config=small(
                head_dim=16,
                rope_parameters=dict(
                    rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2]
                ),
            ),
            vision_config=dict(
                VISION,
                out_hidden_size=64,
                num_position_embeddings=16,
                deepstack_visual_indexes=[0, 1],
            ),
        ),
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        dict(
            text_config=small(
                rope_parameters=dict(
                    rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2]
                )
            ),
            vision_config=dict(VISION, out_hidden_size=64, fullatt_block_indexes=[1]),
        ),
    ),
    "qwen4_exp_text": (
        "qwen4_exp_text",
        small(
            **LINEAR,
            intermediate_size=...,
            shared_expert_intermediate_size=64,
            layer_types=[
                "linear_attention",
                "linear_attention",
                "linear_attention",
                "indexed_attention",
            ],
            hc_lowrank=64,
            ngram_vocab_size_base=1000,
            ple_embed_dim=16,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=16,
            indexer_budget=8,
            indexer_compress_ratio=2,
            **EXPERTS,
        ),
    ),
    "gpt_oss": (
        "gpt_oss",
        small(
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=10000.0,
                factor=2.0,
                beta_fast=32.0,
                beta_slow=1.0,
                original_max_position_embeddings=128,
                truncate=False,
            ),
        ),
    ),
    "gemma3": (
        "gemma3",
        dict(
            text_config=small(
                head_dim=16, sliding_window=5, layer_types=SLIDING, query_pre_attn_scalar=16
            ),
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=258,
            boi_token_index=257,
            eoi_token_index=256,
        ),
    ),
    "gemma3n_text": (
        "gemma3n_text",
        small(
            head_dim=16,
            sliding_window=5,
            layer_types=SLIDING,
            intermediate_size=[128] * 4,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=64,
            num_kv_shared_layers=0,
            laurel_rank=64,
            activation_sparsity_pattern=[0.0] * 4,
        ),
    ),
    "gemma4_text": (
        "gemma4_text",
        small(
            head_dim=16,
            sliding_window=5,
            layer_types=SLIDING,
            hidden_size_per_layer_input=0,
            global_head_dim=32,
        ),
    ),
    "gemma4_text/ple+shared": (
        "gemma4_text",
        small(
            head_dim=16,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"] * 2,
            hidden_size_per_layer_input=64,
            vocab_size_per_layer_input=VOCABULARY,
            num_kv_shared_layers=2,
            final_logit_softcapping=30.0,
            global_head_dim=32,
        ),
    ),
    "gemma4_text/moe": (
        "gemma4_text",
        small(
            head_dim=16,
            sliding_window=5,
            layer_types=SLIDING,
            hidden_size_per_layer_input=0,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=64,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            final_logit_softcapping=30.0,
        ),
    ),
    "gemma4": (
        "gemma4",
        dict(
            text_config=small(
                head_dim=16,
                sliding_window=5,
                layer_types=SLIDING,
                hidden_size_per_layer_input=0,
                final_logit_softcapping=30.0,
            ),
            vision_config=dict(VISION, num_key_value_heads=2, head_dim=16),
            image_token_id=258,
            audio_config=None,
        ),
    ),
    "gemma4_unified_text": (
        "gemma4_unified_text",
        small(head_dim=16, sliding_window=5, layer_types=SLIDING),
    ),
    "llama4_text": (
        "llama4_text",
        small(
            head_dim=16,
            intermediate_size_mlp=128,
            num_local_experts=4,
            num_experts_per_tok=1,
            attention_chunk_size=5,
            interleave_moe_layer_step=2,
        ),
    ),
    "llama4": (
        "llama4",
        dict(
            text_config=small(
                head_dim=16,
                intermediate_size_mlp=128,
                num_local_experts=4,
                num_experts_per_tok=1,
                attention_chunk_size=5,
                interleave_moe_layer_step=2,
            ),
            vision_config=dict(
                VISION, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32
            ),
        ),
    ),
    "mistral3": (
        "mistral3",
        dict(
            text_config=dict(small(head_dim=16, sliding_window=None), model_type="mistral"),
            vision_config=dict(VISION, head_dim=16, model_type="pixtral"),
        ),
    ),
    "mistral4": ("mistral4", small(**MLA)),
    "ministral3": ("ministral3", small(head_dim=16)),
    "deepseek_v2": ("deepseek_v2", small(**MLA, first_k_dense_replace=1)),
    "deepseek_v3": ("deepseek_v3", small(**MLA, first_k_dense_replace=1)),
    "deepseek_v32": (
        "deepseek_v32",
        small(**MLA, first_k_dense_replace=1, index_topk=8, index_head_dim=16, index_n_heads=2),
    ),
    "deepseek_v4": (
        "deepseek_v4",
        small(
            intermediate_size=...,
            num_key_value_heads=1,
            head_dim=32,
            q_lora_rank=64,
            o_groups=2,
            o_lora_rank=64,
            index_n_heads=2,
            index_head_dim=16,
            index_topk=8,
            sliding_window=5,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            hc_mult=2,
            qk_rope_head_dim=8,
        ),
    ),
    "glm4": ("glm4", small(head_dim=16)),
    "glm4_moe": (
        "glm4_moe",
        small(head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    ),
    "glm4_moe_lite": ("glm4_moe_lite", small(**MLA)),
    "glm_moe_dsa": ("glm_moe_dsa", small(**MLA, index_topk=8, index_head_dim=16, index_n_heads=2)),
    "granite": (
        "granite",
        small(
            logits_scaling=8.0,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.0625,
        ),
    ),
    "granitemoe": ("granitemoe", small(logits_scaling=8.0, num_local_experts=4)),
    "granitemoehybrid": (
        "granitemoehybrid",
        small(
            logits_scaling=8.0,
            num_local_experts=4,
            shared_intermediate_size=64,
            layer_types=HYBRID,
            mamba_n_heads=4,
            mamba_d_state=16,
            mamba_d_head=32,
        ),
    ),
    "granitemoehybrid/attn-only": (
        "granitemoehybrid",
        small(
            logits_scaling=8.0,
            num_local_experts=0,
            shared_intermediate_size=64,
            layer_types=["full_attention"] * 4,
            position_embedding_type="rope",
            mamba_n_heads=4,
            mamba_d_state=16,
            mamba_d_head=32,
        ),
    ),
    "lfm2": (
        "lfm2",
        small(
            layer_types=["conv", "conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False
        ),
    ),
    "lfm2_moe": (
        "lfm2_moe",
        small(
            layer_types=["conv", "conv", "full_attention", "conv"], num_dense_layers=1, **EXPERTS
        ),
    ),
    "lfm3": (
        "lfm3",
        small(
            head_dim=16,
            sliding_window=5,
            layer_types=["conv", "conv", "full_attention", "sliding_attention"],
        ),
    ),
    "falcon_h1": (
        "falcon_h1",
        small(
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=16,
            lm_head_multiplier=0.25,
            embedding_multiplier=2.0,
        ),
    ),
    "nemotron_h": (
        "nemotron_h",
        small(
            num_hidden_layers=...,
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            head_dim=16,
            mamba_num_heads=4,
            mamba_head_dim=32,
            n_groups=2,
            ssm_state_size=16,
            n_routed_experts=4,
            moe_intermediate_size=64,
            moe_shared_expert_intermediate_size=64,
        ),
    ),
    "nemotron": ("nemotron", small(head_dim=16)),
    "olmo2": ("olmo2", small()),
    "olmo3": ("olmo3", small(sliding_window=5, layer_types=SLIDING)),
    "olmoe": ("olmoe", small(num_experts=4, num_experts_per_tok=2)),
    "cohere": ("cohere", small(logit_scale=0.0625, head_dim=...)),
    "minimax_m2": ("minimax_m2", small(head_dim=16, num_local_experts=4, num_experts_per_tok=2)),
    "starcoder2": ("starcoder2", small()),
    "phimoe": ("phimoe", small(num_local_experts=4)),
    "jamba": (
        "jamba",
        small(
            num_experts=4,
            num_experts_per_tok=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=16,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
    ),
    "kimi_linear": (
        "kimi_linear",
        small(
            num_key_value_heads=4,
            kv_lora_rank=64,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            num_experts=4,
            num_experts_per_token=2,
            moe_intermediate_size=64,
            layer_types=HYBRID,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
            linear_head_dim=16,
            linear_num_heads=4,
        ),
    ),
    "arcee": ("arcee", small(head_dim=16)),
    "stablelm": ("stablelm", small()),
    "nanochat": ("nanochat", small(num_key_value_heads=4)),
    "gpt2": (
        "gpt2",
        dict(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=4,
            n_head=4,
            n_positions=256,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "glm": ("glm", small(head_dim=16)),
    "bloom": ("bloom", {"vocab_size": 128, "hidden_size": 64, "n_layer": 4, "n_head": 4}),
    "falcon": (
        "falcon",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
}
# Checkpoints with quantised weights, which quantised_checkpoints.py writes -> the entry of KINDS
# that has the same model class.
QUANTISED_CHECKPOINTS = {"gpt_oss/mxfp4": "gpt_oss", "deepseek_v3/fp8": "deepseek_v3"}

"""For each rule, a case in which it applies, and the most similar case in which it does not.

A case has the differences from a run of Llama 8B on 8 GPUs of 80 GiB at ZeRO-2 in bf16:
- `config`: config.json of the model; `shape`: changed fields of the model's shape;
- `layout`: changed fields of the Layout (ZeRO stage, micro-batch, ...); `hardware`: the GPUs;
- `own`: the user's DeepSpeed JSON; `packages`: package -> installed version;
- `data`: size of the prepared data; `proof`: results of the checks of the model class;
- all other keys are settings of the run file.
"""

from dataclasses import replace

from pipeline.plan.deepspeed.keys import REMOVED, REMOVED_FROM_ZERO
from pipeline.plan.given.class_proof import Proof
from pipeline.plan.given.families import Experts
from tests.plans import CPU, LLAMA_8B, SMOLLM2, gpu, sized

SLOW_IN_BF16 = replace(CPU, is_slow_in_bf16=True)
Z1, Z2, Z3 = ({"zero_stage": stage} for stage in (1, 2, 3))
FP16, FP32 = {"training_dtype": "float16"}, {"training_dtype": "float32"}
MOE = {"experts": Experts(count=8, per_token=2, size=64).tensors(4096)}
IN_4BIT = {"load_in_4bit": True}
CHECKPOINTED = {"checkpointed_layers": 32}
SHORT = LLAMA_8B | {"max_position_embeddings": 4096}
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}
DYNAMIC = {
    "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0},
}  # fmt: skip
LONGROPE = LLAMA_8B | {
    "max_position_embeddings": 131072,
    "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4096},
}

SPLIT = {"sequence_parallel_size": 2}
MIXES_DOCUMENTS = Proof(without_packs=["1 of 4 blocks"])
WITHOUT_REENTRANT = Proof(without_reentrant=["gradients differ"])


def zero(**keys):
    """A DeepSpeed JSON with these keys of ZeRO."""
    return {"zero_optimization": keys}


def with_layout(*layout_changes, **other_keys):
    """A case with these changed fields of the layout, and these other keys."""
    layout = {}
    for changes in layout_changes:
        layout |= changes
    return {"layout": layout} | other_keys


# Rule -> a case in which it applies, and the most similar case in which it does not.
CASES = {
    "saved-tied": (
        {
            "shape": {"is_tied": True, "embeddings_name": "transformer.wte"},
            "modules_to_save": ["wte"],
        },
        {"config": SMOLLM2, "modules_to_save": ["lm_head"]},
    ),
    "new-tokens": (
        {"shape": {"source": "a name"}, "new_tokens": ["<a>"], "modules_to_save": ["lm_head"]},
        {"shape": {"source": "a name"}, "new_tokens": ["<a>"]},
    ),
    "split-base": (
        {"init_lora_weights": "pissa", "load_in_4bit": True},
        {"init_lora_weights": "pissa_niter_8"},
    ),
    "loftq": (
        {"init_lora_weights": "loftq", "load_in_8bit": True},
        {"init_lora_weights": "loftq", "load_in_4bit": True},
    ),
    "eva": (
        {"init_lora_weights": "eva", "rank_pattern": {"q_proj": 2049}},
        {"init_lora_weights": "eva", "rank_pattern": {"q_proj": 2048}},
    ),
    "loftq-when-served": (
        {"init_lora_weights": "loftq", "load_in_4bit": True},
        {"init_lora_weights": "gaussian", "load_in_4bit": True},
    ),
    "tied-pair": (
        {"config": SMOLLM2, "lora_target_modules": r".*(q_proj|lm_head)|lm_head"},
        {"config": SMOLLM2, "lora_target_modules": "all-linear"},
    ),
    "embeddings-or-head-not-yet": (
        {"lora_target_modules": r".*(q_proj|embed_tokens)"},
        {"lora_target_modules": r".*(q_proj|o_proj)"},
    ),
    "tokens-without-embeddings": (
        {"shape": {"required_vocab_size": 128257}},
        {"shape": {"required_vocab_size": 128256}},
    ),
    "bidirectional": (
        {"config": LLAMA_8B | {"use_bidirectional_attention": True}},
        {"config": LLAMA_8B | {"use_bidirectional_attention": False}},
    ),
    "other-head": (
        {"config": LLAMA_8B | {"architectures": ["LlamaForSequenceClassification"]}},
        {"config": LLAMA_8B | {"architectures": ["LlamaForCausalLM"]}},
    ),
    "class-refused": ({"proof": Proof(refusals=["loss"])}, {"proof": Proof()}),
    "class-packs": ({"proof": MIXES_DOCUMENTS}, {"proof": MIXES_DOCUMENTS, "packing": False}),
    "class-re-entrant": (
        with_layout(Z3, CHECKPOINTED, proof=WITHOUT_REENTRANT),
        with_layout(Z2, CHECKPOINTED, proof=WITHOUT_REENTRANT),
    ),
    "class-not-proven": (
        {"shape": {"is_from_class": True}},
        {"shape": {"is_from_class": True}, "proof": Proof()},
    ),
    "class-merge": ({"proof": Proof(without_merge=["names"])}, {"proof": Proof()}),
    "split-heads": ({"sequence_parallel_size": 3}, {"sequence_parallel_size": 16}),
    "split-blocks": (
        {"proof": MIXES_DOCUMENTS, "packing": False, **SPLIT},
        {"proof": MIXES_DOCUMENTS, "packing": False},
    ),
    "split-attention-dropout": (
        {"config": LLAMA_8B | {"attention_dropout": 0.1}, **SPLIT},
        {"config": LLAMA_8B | {"resid_pdrop": 0.1}, **SPLIT},
    ),
    "split-flash-attention": (
        {"use_flash_attention": True, **SPLIT},
        {"use_flash_attention": True, "sequence_parallel_size": 1},
    ),
    "prequantised-base": (
        {"shape": {"quantization": "gptq"}},
        {"shape": {"quantization": "mxfp4"}},
    ),
    "dequantised-base": (
        {"shape": {"quantization": "fp8"}},
        {"shape": {"quantization": "gptq"}},
    ),
    "flash-attention-missing": (
        {"use_flash_attention": True, "packages": {"flash-attn": None}},
        {"use_flash_attention": True, "packages": {"flash-attn": "2.8"}},
    ),
    "dora-zero3": (with_layout(Z3, use_dora=True), with_layout(Z2, use_dora=True)),
    "dora-8bit": (
        {"use_dora": True, "load_in_8bit": True},
        {"use_dora": True, "load_in_4bit": True},
    ),
    "vllm-max-lora-rank": (
        {"lora_r": 9, "init_lora_weights": "olora"},
        {"lora_r": 8, "init_lora_weights": "olora"},
    ),
    "vllm-rank-limit": ({"rank_pattern": {"q_proj": 513}}, {"rank_pattern": {"q_proj": 512}}),
    "modules-when-served": ({"modules_to_save": ["x"]}, {"modules_to_save": []}),
    "new-tokens-when-served": (
        {"shape": {"source": "a name"}, "new_tokens": ["<a>"]},
        {"new_tokens": []},
    ),
    "llama-cpp-scaling": ({"use_rslora": True}, {"rank_pattern": {"q_proj": 8}}),
    "llama-cpp-model": ({"shape": {"model_type": "phimoe"}}, {"shape": {"model_type": "phi3"}}),
    "dora-when-served": ({"use_dora": True}, {"use_rslora": True}),
    "one-scaling-when-served": (
        {"alpha_pattern": {"q_proj": 8.0}},
        {"layers_to_transform": [0]},
    ),
    "8bit-zero3": (
        with_layout(Z3, load_in_8bit=True),
        with_layout(Z2, load_in_8bit=True),
    ),
    "4bit-storage": (
        {"bnb_4bit_quant_storage": "float16", **IN_4BIT},
        {"bnb_4bit_quant_storage": "bfloat16", **IN_4BIT},
    ),
    "4bit-moe": ({"shape": MOE, **IN_4BIT}, {"shape": MOE}),
    "experts-plain": (
        {"shape": MOE, "lora_target_modules": ["q_proj", "experts"], "use_dora": True},
        {"shape": MOE, "lora_target_modules": ["q_proj", "experts"], "use_rslora": True},
    ),
    "experts-serving": (
        {"shape": MOE, "lora_target_modules": ["q_proj", "experts"]},
        {"shape": MOE, "lora_target_modules": ["q_proj"]},
    ),
    "fp16-cpu": ({"fp16": True, "hardware": CPU}, {"fp16": True}),
    "bf16-old-gpu": ({"hardware": gpu(capability=(7, 5))}, {"hardware": gpu(capability=(8, 0))}),
    "fp16-for-bf16-model": (
        with_layout(FP16),
        with_layout(FP16, config=LLAMA_8B | {"dtype": "float16"}),
    ),
    "deepspeed-zero3-frozen": (
        with_layout(Z3, packages={"deepspeed": "0.19.2"}),
        with_layout(Z3, packages={"deepspeed": "0.19.3"}),
    ),
    "deepspeed-wrong-gradients": (
        {"packages": {"deepspeed": "0.17.6"}},
        {"packages": {"deepspeed": "0.18.3"}},
    ),
    "deepspeed-zero1-last-micro-batch": (
        with_layout(Z1, packages={"deepspeed": "0.18.10"}),
        with_layout(Z1, packages={"deepspeed": "0.18.11"}),
    ),
    "deepspeed-shared-parameter": (
        {"packages": {"deepspeed": "0.19.3"}},
        {"packages": {"deepspeed": None}},
    ),
    "transformers-zero3-rotary": (
        with_layout(Z3, packages={"transformers": "5.22.0"}),
        with_layout(Z3, packages={"transformers": "5.23.0"}),
    ),
    "rope-original-length": (
        {"config": LONGROPE, "max_length": 8192, "data": sized(9, longest=5000)},
        {"config": LONGROPE, "max_length": 8192, "data": sized(9, longest=4096)},
    ),
    "rope-original-length-uncounted": (
        {"config": LONGROPE, "max_length": 8192},
        {"config": LONGROPE, "max_length": 4096},
    ),
    "beyond-positions": (
        {"config": SHORT, "max_length": 8192, "data": sized(9, longest=5000)},
        {"config": SHORT | YARN, "max_length": 8192, "data": sized(9, longest=5000)},
    ),
    "router-loss": (
        {"config": LLAMA_8B | {"output_router_logits": True}},
        {"config": LLAMA_8B | {"output_router_logits": False}},
    ),
    "base-dropout": (
        {"config": LLAMA_8B | {"resid_pdrop": 0.1}},
        {"config": LLAMA_8B | {"resid_pdrop": 0.0, "attention_dropout": None}},
    ),
    "slow-stop": (
        with_layout({"micro_batch_size": 64}, max_length=8192),
        with_layout({"micro_batch_size": 1}, max_length=8192),
    ),
    "4bit-zero3-unchecked": (with_layout(Z3, **IN_4BIT), with_layout(Z3, CHECKPOINTED, **IN_4BIT)),
    "persistence-too-low": (
        with_layout(Z3, own=zero(stage3_param_persistence_threshold=100_000)),
        with_layout(Z3, own=zero(stage3_param_persistence_threshold="auto")),
    ),
    "gathered-too-much": (
        with_layout(Z3, own=zero(stage3_max_live_parameters=1e9)),
        with_layout(Z3, own=zero(stage3_max_live_parameters=1e6)),
    ),
    "bucket-too-large": ({"own": zero(reduce_bucket_size=5e8)}, {}),
    "overlap-comm": ({"own": zero(overlap_comm=True)}, with_layout(Z3)),
    "moe-without-leaf-modules": (
        with_layout(Z3, shape=MOE, own=zero(leaf_module={"classes": []})),
        with_layout(Z3, shape=MOE, own=zero(leaf_module={"classes": ["Block"]})),
    ),
    "hpz-without-zero3": ({"hpz_partition_size": 8}, with_layout(Z3, hpz_partition_size=8)),
    "hpz-divides-ranks": (
        with_layout(Z3, hpz_partition_size=3),
        with_layout(Z3, hpz_partition_size=4),
    ),
    "offload-param-without-zero3": ({"offload_param": "cpu"}, with_layout(Z3, offload_param="cpu")),
    "nvme-not-yet": (
        with_layout(Z3, own=zero(offload_param={"device": "nvme"})),
        with_layout(Z3, own=zero(offload_param={"device": "none"})),
    ),
    "cpu-offload-param": (
        {"own": zero(cpu_offload_param=True)},
        {"own": zero(cpu_offload_param=False)},
    ),
    "offload-optimizer": (
        {"own": zero(offload_optimizer={"device": "cpu"})},
        {"own": zero(offload_optimizer={"device": "none", "pin_memory": True})},
    ),
    "old-stage-1": (
        {"own": zero(legacy_stage1=True)},
        {"own": zero(legacy_stage1=False, elastic_checkpoint=False)},
    ),
    "zenflow": ({"own": zero(zenflow={})}, {"own": zero(zenflow=None)}),
    "4bit-quantized-weights": (
        {"own": zero(zero_quantized_weights=True), **IN_4BIT},
        {"own": zero(zero_quantized_weights=True)},
    ),
    "quantized-communication": (
        {"own": zero(zero_quantized_weights=True)},
        {"own": zero(zero_quantized_weights=False)},
    ),
    "quantized-nontrainable-weights": (
        {"own": zero(zero_quantized_nontrainable_weights=True)},
        {"own": zero(zero_quantized_nontrainable_weights=False)},
    ),
    "4bit-all-reduce-fetch": (
        {"own": zero(stage3_use_all_reduce_for_fetch_params=True), **IN_4BIT},
        {"own": zero(stage3_use_all_reduce_for_fetch_params=True)},
    ),
    "round-robin-gradients": (
        {"own": zero(round_robin_gradients=True)},
        with_layout(Z3, own=zero(round_robin_gradients=True)),
    ),
    "module-granularity": (
        with_layout(Z3, own=zero(stage3_module_granularity_threshold=1000)),
        with_layout(Z3, own=zero(stage3_module_granularity_threshold=0)),
    ),
    "no-gradient-norm": (
        {"own": zero(compute_grad_norm=False)},
        {"own": zero(compute_grad_norm=True)},
    ),
    "memory-inefficient-linear": (
        with_layout(Z3, own=zero(memory_efficient_linear=False)),
        with_layout(Z2, own=zero(memory_efficient_linear=False)),
    ),
    "json-no-effect": (
        {"own": {"activation_checkpointing": {"partition_activations": True}}},
        {"own": {"activation_checkpointing": {}, "wall_clock_breakdown": True}},
    ),
    "json-against-plan": (
        {"own": {"train_batch_size": 16}},
        {"own": {"train_batch_size": 8, "optimizer": {"params": {"lr": 2e-4}}}},
    ),
    "json-against-precision": (
        {"own": {"fp16": {"enabled": True}}},
        {"own": {"fp16": {"enabled": False}, "bf16": {"enabled": True}}},
    ),
    "16-bit-masters": (
        {"own": {"bf16": {"bf16_master_weights_and_grads": True}}},
        {"own": {"bf16": {"bf16_master_weights_and_grads": False}}},
    ),
    "bf16-overflow-unchecked": (
        {"own": {"bf16": {"check_grad_overflow": False}}},
        {"own": {"bf16": {"check_grad_overflow": True}}},
    ),
    "zero1-fp32-accumulation": (
        with_layout(Z1, own={"data_types": {"grad_accum_dtype": "fp32"}}),
        with_layout(Z2, own={"data_types": {"grad_accum_dtype": "fp32"}}),
    ),
    "zero1-bf16-accumulation": (
        with_layout(Z1, {"accumulation_steps": 2}),
        with_layout(Z2, {"accumulation_steps": 2}),
    ),
    "16-bit-gradients": (
        {"own": {"communication_data_type": "bf16"}},
        with_layout(FP32, own={"communication_data_type": "bf16"}),
    ),
    "torch-autocast": (
        {"own": {"torch_autocast": {"enabled": True}}},
        {"own": {"torch_autocast": {"enabled": False}}},
    ),
    "gradient-division": (
        {"own": {"gradient_predivide_factor": 2.0}},
        {"own": {"gradient_predivide_factor": 1.0, "prescale_gradients": False}},
    ),
    "own-accumulation": (
        {"own": {"managed_gradient_accumulation": False}},
        {"own": {"managed_gradient_accumulation": True}},
    ),
    "scheduler": ({"own": {"scheduler": {"type": "WarmupLR"}}}, {"own": {}}),
    "optimizer-not-adamw": (
        {"own": {"optimizer": {"type": "Lion"}}},
        {"own": {"optimizer": {"type": "adamw"}}},
    ),
    "optimizer-parameters": (
        {"own": {"optimizer": {"params": {"amsgrad": True}}}},
        {"own": {"optimizer": {"params": {"betas": [0.9, 0.95], "eps": 1e-6}}}},
    ),
    "compiled-adam": (
        {"own": {"optimizer": {"params": {"torch_adam": False}}}},
        {"own": {"optimizer": {"params": {"torch_adam": True}}}},
    ),
    "model-parallel": (
        {"own": {"tensor_parallel": {"autotp_size": 2}}},
        {"own": {"tensor_parallel": {"autotp_size": 1}, "sequence_parallel_size": 1}},
    ),
    "compile-not-yet": (
        {"own": {"compile": {"deepcompile": True}}},
        {"own": {"compile": {"deepcompile": False}}},
    ),
    "other-engines": (
        {"own": {"autotuning": {"enabled": True}}},
        {"own": {"autotuning": {"enabled": False}}},
    ),
    "checkpoint-writer": (
        {"own": {"checkpoint": {"writer": {"type": "fast"}}}},
        {"own": {"checkpoint": {"load_universal": True}}},
    ),
    "flops-profiler-4bit": (
        {"own": {"flops_profiler": {"enabled": True}}, **IN_4BIT},
        {"own": {"flops_profiler": {"enabled": True}}},
    ),
    "alpha": ({"lora_r": 8, "lora_alpha": 64}, {"lora_r": 8, "lora_alpha": 8}),
    "lora-r": ({"lora_r": 4}, {"lora_r": 8}),
    "learning-rate": ({"lr": 3e-4}, {"lr": 3e-4, "config": SMOLLM2}),
    "data-small": ({"data": sized(999)}, {"data": sized(999), "epochs": 3, "lora_dropout": 0.1}),
    "data-medium": ({"data": sized(1000)}, {"data": sized(1000), "epochs": 2}),
    "data-large": ({"data": sized(10_001), "epochs": 3}, {"data": sized(10_001)}),
    "few-steps": (
        {"data": sized(100), "packing": False, "epochs": 2},
        {"data": sized(500), "packing": False, "epochs": 2},
    ),
    "bf16-on-cpu": (
        {"config": SMOLLM2, "hardware": SLOW_IN_BF16, "bf16": True},
        {"config": SMOLLM2, "hardware": SLOW_IN_BF16, "layout": FP32},
    ),
    "compute-dtype": (
        {"bnb_4bit_compute_dtype": "float16", **IN_4BIT},
        {"bnb_4bit_compute_dtype": "bfloat16", **IN_4BIT},
    ),
    "double-quantisation": (
        {"bnb_4bit_use_double_quant": False, **IN_4BIT},
        {"bnb_4bit_use_double_quant": False},
    ),
    "nf4": ({"bnb_4bit_quant_type": "fp4", **IN_4BIT}, {"bnb_4bit_quant_type": "fp4"}),
    "evaluation-matches-saving": (
        {"eval_data": "e", "evaluation_strategy": "epoch", "save_strategy": "steps"},
        {"eval_data": "e", "evaluation_strategy": "epoch"},
    ),
    "untiled-mlps": (
        with_layout({"mlp_tiles": 4}, shape=MOE),
        with_layout({"mlp_tiles": 4}),
    ),
    "without-effect": (
        {"save_strategy": "epoch", "save_steps": 7},
        {"save_strategy": "steps", "save_steps": 7},
    ),
    "checkpointing": (
        {"gradient_checkpointing": False, "hardware": gpu(18)},
        {"gradient_checkpointing": False, "hardware": gpu(80)},
    ),
    **{f"removed-{key.replace('_', '-')}": ({"own": {key: {}}}, {"own": {}}) for key in REMOVED},
    **{
        f"removed-{key.replace('_', '-')}": ({"own": zero(**{key: 2})}, {"own": zero()})
        for key in REMOVED_FROM_ZERO
    },
}  # fmt: skip

# A rule and one more case in which it applies: another key, another limit, or more settings.
OTHER_CASES = [
    ("embeddings-or-head-not-yet", {"lora_target_modules": r"lm_head|.*q_proj"}),
    ("gathered-too-much", with_layout(Z3, own=zero(stage3_max_reuse_distance=1e9))),
    ("gathered-too-much", with_layout(Z3, own=zero(stage3_prefetch_bucket_size=5e8))),
    ("hpz-without-zero3", {"own": zero(zero_hpz_partition_size=2)}),
    ("offload-param-without-zero3", {"own": zero(offload_param={"device": "cpu"})}),
    ("cpu-offload-param", {"own": zero(cpu_offload_use_pin_memory=True)}),
    ("old-stage-1", {"own": zero(elastic_checkpoint=True)}),
    ("checkpoint-writer", {"own": {"datastates_ckpt": {}}}),
    ("json-against-precision", {"own": {"data_types": {"param_dtype": "fp16"}}}),
    ("offload-optimizer", {"own": zero(cpu_offload=True)}),
    ("zenflow", {"own": zero(offload_optimizer={"device": "cpu", "super_offload": True})}),
    ("quantized-communication", {"own": zero(zero_quantized_gradients=True)}),
    ("json-no-effect", {"own": zero(stage3_gather_16bit_weights_on_model_save=True)}),
    ("json-no-effect", {"own": zero(stage3_gather_fp16_weights_on_model_save=True)}),
    ("json-no-effect", {"own": {"zero_allow_untested_optimizer": True}}),
    ("json-no-effect", {"own": {"checkpoint": {"load_universal": True}}}),
    ("compile-not-yet", {"own": {"compile": {"deepcompile": True}}, **IN_4BIT}),
    ("nvme-not-yet", with_layout(Z3, own=zero(offload_param={"device": "nvme"}), **IN_4BIT)),
    (
        "rope-original-length",
        {
            "config": LLAMA_8B | DYNAMIC,
            "max_length": 8192,
            "data": sized(9, longest=5000),
        },
    ),
    (
        "rope-original-length",
        with_layout(
            {"micro_batch_size": 2},
            config=LONGROPE,
            packing=False,
            max_length=8192,
            data=sized(9, longest=5000),
        ),
    ),
    (
        "rope-original-length",
        with_layout(
            {"sequence_parallel_size": 2},
            config=LONGROPE,
            packing=False,
            max_length=8192,
            data=sized(9, longest=5000),
        ),
    ),
    ("split-attention-dropout", {"config": LLAMA_8B | {"attn_pdrop": 0.1}, **SPLIT}),
    ("beyond-positions", {"config": SHORT, "max_length": 4097}),
    ("base-dropout", {"config": LLAMA_8B | {"router_jitter_noise": 0.01}}),
    ("json-against-plan", {"own": {"gradient_clipping": 0.5}}),
    ("json-against-plan", {"own": zero(stage=3)}),
    ("json-against-plan", {"own": zero(zero_hpz_partition_size=8)}),
    ("json-against-plan", {"own": zero(offload_param={"device": "cpu"})}),
    ("json-against-plan", {"own": {"optimizer": {"params": {"weight_decay": 0.1}}}}),
    ("json-against-precision", {"own": {"bf16": {"enabled": False}}}),
    ("json-against-precision", {"own": {"data_types": {"buffer_dtype": "bf16"}}}),
    ("16-bit-masters", with_layout(FP16, own={"fp16": {"fp16_master_weights_and_grads": True}})),
    ("16-bit-gradients", {"own": {"data_types": {"grad_accum_dtype": "bf16"}}}),
    ("gradient-division", {"own": {"prescale_gradients": True}}),
    ("gradient-division", {"own": {"gradient_allreduce_op": "SUM"}}),
    ("optimizer-parameters", {"own": {"optimizer": {"legacy_fusion": True}}}),
    ("model-parallel", {"own": {"expert_parallel": {"enabled": True}}}),
    ("model-parallel", {"own": {"sequence_parallel_size": 2}}),
    ("model-parallel", {"own": {"pipeline": {"stages": 2}}}),
    ("other-engines", {"own": {"hybrid_engine": {"enabled": True}}}),
    ("other-engines", {"own": {"data_efficiency": {"enabled": True}}}),
    ("other-engines", {"own": {"weight_quantization": {}}}),
    ("lora-r", {"lora_r": 256}),
    ("learning-rate", {"lr": 5e-6}),
    ("learning-rate", {"lr": 3e-3, "config": SMOLLM2}),
    ("data-medium", {"data": sized(5000), "epochs": 2, "lora_dropout": 0.0}),
]

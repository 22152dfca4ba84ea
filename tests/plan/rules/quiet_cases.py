"""Cases in which rules do not apply: ordinary runs, and runs that lack one condition of a rule.

The keys of a case are those of rule_cases.py.
"""

from dataclasses import replace

from pipeline.plan.given.class_proof import Proof
from tests.plan.rules.rule_cases import (
    CHECKPOINTED,
    FP16,
    FP32,
    IN_4BIT,
    LONGROPE,
    MOE,
    SHORT,
    WITHOUT_REENTRANT,
    Z1,
    Z3,
    with_layout,
    zero,
)
from tests.plans import CPU, LLAMA_8B, SMOLLM2, gpu, sized

MIXING_CLASS = {"separate_blocks": 0}
HEAD_BIAS = {"has_head_bias": True}
HEAD = {"lora_target_modules": r".*(q_proj|lm_head)|lm_head"}
PISSA = {"init_lora_weights": "pissa"}
LOFTQ = {"init_lora_weights": "loftq", "load_in_4bit": True}
ADAPTED_EXPERTS = {"shape": MOE, "lora_target_modules": ["q_proj", "experts"]}
STRATEGIES = {"eval_data": "e", "evaluation_strategy": "epoch", "save_strategy": "steps"}
OLD_GPU = gpu(capability=(7, 5))
LONG = {"config": LONGROPE, "max_length": 8192}
TOO_LONG = LONG | {"data": sized(9, longest=5000)}

# Name of a run -> its case, with `lora_r: 16`, and the ids of the rules that apply.
ORDINARY_RUNS = {
    "zero2": ({}, set()),
    "zero1": (with_layout(Z1), set()),
    "zero3": (with_layout(Z3), set()),
    "zero3 checkpointed": (with_layout(Z3, CHECKPOINTED), set()),
    "fp32": (with_layout(FP32), set()),
    "fp32 on an old GPU": (with_layout(FP32, hardware=OLD_GPU), set()),
    "fp16": (with_layout(FP16, config=LLAMA_8B | {"dtype": "float16"}), set()),
    "4 bits": (IN_4BIT, set()),
    "4 bits zero3 checkpointed": (with_layout(Z3, CHECKPOINTED, **IN_4BIT), set()),
    "8 bits": ({"load_in_8bit": True}, set()),
    "experts": ({"shape": MOE}, set()),
    "experts zero3": (with_layout(Z3, shape=MOE), set()),
    "CPU": ({"config": SMOLLM2, "hardware": CPU, "layout": {"ranks_per_node": 2}}, set()),
    "accumulation": (with_layout({"accumulation_steps": 4}), set()),
    "split sequences": ({"sequence_parallel_size": 2}, set()),
    "checked class": ({"shape": {"is_from_class": True}, "proof": Proof()}, set()),
    "documents": ({"packing": False}, set()),
    "small data": ({"data": sized(500)}, {"data-small", "few-steps"}),
    "medium data": ({"data": sized(5000)}, {"data-medium"}),
    "large data": ({"data": sized(50_000)}, set()),
}  # fmt: skip

# Rule, and a case that differs from one in which the rule applies by one of its conditions.
QUIET_CASES = [
    ("alpha", {"lora_r": 8, "lora_alpha": 64, "use_rslora": True}),
    ("few-steps", {"data": sized(100), "packing": False, "epochs": 2, "max_steps": 100}),
    ("few-steps", {"data": sized(120), "packing": False, "epochs": 2}),  # 30 steps of 8 sequences
    ("data-large", {"data": sized(10_001), "epochs": 3, "max_steps": 100}),
    ("class-re-entrant", with_layout(Z3, proof=WITHOUT_REENTRANT)),
    ("class-packs", {"shape": MIXING_CLASS}),
    ("4bit-storage", {"bnb_4bit_quant_storage": "float16"}),
    ("zero1-bf16-accumulation", with_layout(Z1, FP32, {"accumulation_steps": 2})),
    ("zero1-fp32-accumulation", with_layout(Z1)),
    (
        "zero1-fp32-accumulation",
        with_layout(Z1, FP32, own={"data_types": {"grad_accum_dtype": "fp32"}}),
    ),
    ("flops-profiler-4bit", {"own": {"flops_profiler": {"enabled": False}}, **IN_4BIT}),
    ("vllm-max-lora-rank", {"rank_pattern": {"q_proj": 513}}),
    ("checkpointing", {"hardware": gpu(18)}),
    ("compute-dtype", {"bnb_4bit_compute_dtype": "float16"}),
    ("evaluation-matches-saving", {"evaluation_strategy": "epoch", "save_strategy": "steps"}),
    ("evaluation-matches-saving", STRATEGIES | {"evaluation_strategy": "no"}),
    ("evaluation-matches-saving", STRATEGIES | {"save_strategy": "no"}),
    # Options of an adapter that only some models and targets do not support.
    ("experts-plain", {"shape": MOE, "use_dora": True}),
    ("new-tokens", {"shape": HEAD_BIAS}),
    ("saved-tied", {"shape": {"embeddings_name": "transformer.wte"}, "modules_to_save": ["wte"]}),
    ("tied-pair", HEAD),
    ("embeddings-or-head-not-yet", {"config": SMOLLM2} | HEAD),
    ("split-base", PISSA | {"rank_pattern": {"k_proj": 1024}}),
    ("loftq", LOFTQ | {"rank_pattern": {"k_proj": 1024}}),
    # Documents that are longer than a limit of the model, or not counted yet.
    ("rope-original-length", {"max_length": 8192, "data": sized(9, longest=5000)}),
    ("rope-original-length", TOO_LONG | {"packing": False}),
    ("rope-original-length", TOO_LONG | {"data": None}),
    ("rope-original-length", TOO_LONG | {"data": sized(9)}),
    ("rope-original-length", TOO_LONG | {"data": replace(TOO_LONG["data"], is_exact=False)}),
    ("rope-original-length-uncounted", TOO_LONG),
    ("rope-original-length-uncounted", LONG | {"packing": False}),
    ("beyond-positions", {"config": SHORT, "max_length": 8192, "data": sized(9, longest=4096)}),
    # The versions of packages with a defect, in runs that the defect does not concern.
    ("deepspeed-wrong-gradients", with_layout(Z3, packages={"deepspeed": "0.17.6"})),
    ("deepspeed-zero1-last-micro-batch", {"packages": {"deepspeed": "0.18.10"}}),
    ("deepspeed-zero1-last-micro-batch", with_layout(Z1, FP32, packages={"deepspeed": "0.18.10"})),
    ("deepspeed-shared-parameter", with_layout(Z1, packages={"deepspeed": "0.19.3"})),
    ("deepspeed-shared-parameter", with_layout(FP32, packages={"deepspeed": "0.19.3"})),
    ("deepspeed-zero3-frozen", {"packages": {"deepspeed": "0.19.2"}}),
    ("transformers-zero3-rotary", {"packages": {"transformers": "5.22.0"}}),
    ("transformers-zero3-rotary", with_layout(Z3, FP32, packages={"transformers": "5.22.0"})),
    ("transformers-zero3-rotary", with_layout(Z3, packages={"transformers": "5.22.0"}, **IN_4BIT)),
    ("transformers-zero3-rotary", with_layout(Z3, packages={"transformers": None})),
    # Keys of the DeepSpeed JSON that are without effect at this stage or in this dtype.
    ("persistence-too-low", {"own": zero(stage3_param_persistence_threshold=100_000)}),
    ("gathered-too-much", {"own": zero(stage3_max_live_parameters=1e9)}),
    ("moe-without-leaf-modules", with_layout(Z3, own=zero(leaf_module={"classes": []}))),
    ("moe-without-leaf-modules", {"shape": MOE, "own": zero(leaf_module={"classes": []})}),
    ("overlap-comm", with_layout(Z3, own=zero(overlap_comm=True))),
    ("module-granularity", {"own": zero(stage3_module_granularity_threshold=1000)}),
    ("quantized-communication", {"own": zero(zero_quantized_weights=True), **IN_4BIT}),
]

# Rule, and another case in which it applies: by another one of its conditions.
ALTERNATIVE_CASES = [
    ("class-packs", {"shape": MIXING_CLASS, "packing": True}),
    (
        "flash-attention-missing",
        {"use_flash_attention": True, "hardware": CPU, "packages": {"flash-attn": "2.8"}},
    ),
    ("rope-original-length-uncounted", LONG | {"data": sized(9)}),
    ("beyond-positions", {"config": SHORT, "max_length": 8192, "data": sized(9)}),
    ("saved-tied", {"config": SMOLLM2, "shape": HEAD_BIAS, "modules_to_save": ["lm_head"]}),
    ("new-tokens", {"shape": {"source": "a name"} | HEAD_BIAS, "new_tokens": ["<a>"]}),
    (
        "new-tokens",
        {"shape": {"source": "a name", "has_other_towers": True}, "new_tokens": ["<a>"]},
    ),
    (
        "new-tokens",
        {"shape": {"source": "a name"}, "new_tokens": ["<a>"], "modules_to_save": ["lm_head"]},
    ),
    # k_proj has 1024 outputs.
    *(
        (rule, initial_values | option)
        for rule, initial_values in (("split-base", PISSA), ("loftq", LOFTQ))
        for option in (ADAPTED_EXPERTS, {"use_dora": True}, {"rank_pattern": {"k_proj": 1025}})
    ),
    ("llama-cpp-scaling", {"alpha_pattern": {"q_proj": 8.0}}),
    ("one-scaling-when-served", {"rank_pattern": {"q_proj": 8}}),
]

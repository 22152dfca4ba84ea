"""Commands and notes for serving an adapter, for its model card and for `rankzero export`."""

import json
import re
import shlex
from pathlib import Path

from pipeline.adapter.merge_output import CHAT_TEMPLATE
from pipeline.config.settings import RunSettings
from pipeline.plan.plan import Plan
from pipeline.plan.rules.serving import SERVING_RULES, saved_rank, vllm_rank

_INVALID_CHARACTERS = re.compile(r"[^\w.-]+")  # in the name of an adapter


def vllm_command(
    settings: RunSettings, adapter: str, merged: str, *, is_merged: bool = False
) -> str:
    """Command line that serves base and adapter with vLLM.

    `adapter`, `merged`: paths of the folders. If vLLM rejects the adapter, or with `is_merged`, the
    command serves the merged model.
    """
    max_lora_r = vllm_rank(saved_rank(settings))
    is_rejected = settings.use_dora or settings.modules_to_save or settings.new_tokens
    if max_lora_r is None or is_rejected or is_merged:
        return shlex.join(["vllm", "serve", merged])
    name = _INVALID_CHARACTERS.sub("-", Path(settings.output_dir).name).strip("-.") or "adapter"
    revision = ["--revision", settings.model_revision] if settings.model_revision else []
    words = ["vllm", "serve", settings.model, *revision, "--enable-lora"]
    words += ["--max-lora-rank", str(max_lora_r), "--lora-modules", f"{name}={adapter}"]
    # The adapter folder has a template if the run file sets one, or if the base has this file.
    if settings.chat_template != "model" or (settings.model_folder / CHAT_TEMPLATE).is_file():
        words += ["--chat-template", f"{adapter}/{CHAT_TEMPLATE}"]
    return shlex.join(words)


def bnb_arguments(settings: RunSettings, training_dtype: str) -> str:
    """Arguments of BitsAndBytesConfig, as Python, that quantise a base as in training."""
    compute = settings.bnb_4bit_compute_dtype
    return (
        f"load_in_4bit=True, bnb_4bit_quant_type={json.dumps(settings.bnb_4bit_quant_type)}, "
        f"bnb_4bit_use_double_quant={settings.bnb_4bit_use_double_quant}, "
        f"bnb_4bit_compute_dtype={json.dumps(training_dtype if compute == 'auto' else compute)}"
    )


def serving_notes(plan: Plan) -> list[str]:
    """Messages of the plan's rules about options that vLLM or llama.cpp refuses or ignores."""
    ids = {rule.id for rule in SERVING_RULES}
    return [rule.message for rule in plan.rules if rule.id in ids]

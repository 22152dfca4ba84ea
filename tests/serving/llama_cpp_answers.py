"""Answers of llama.cpp's server, as a script for an environment that has xllamacpp and no torch.

python llama_cpp_answers.py REQUEST.json. The keys of the request are `model`, `lora` (file of the
adapter, or null), `rows` (messages of each prompt), `max_tokens` (of an answer) and `out` (the file
to write).
"""

import json
import sys
from pathlib import Path

import xllamacpp


def main() -> None:
    """Answer each row with the chat template of the GGUF file, at temperature 0."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx, params.n_parallel = 1024, 1
    params.cpuparams.n_threads = 1  # two threads spin at a barrier if other work runs
    params.cpuparams_batch.n_threads = 1
    if request["lora"] is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = request["lora"], 1.0
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    answers = []
    for messages in request["rows"]:
        result = server.handle_chat_completions(
            {"messages": messages, "max_tokens": request["max_tokens"], "temperature": 0.0}
        )
        answers.append(result["choices"][0]["message"]["content"])
    record = {"engine": f"xllamacpp {xllamacpp.__version__}", "answers": answers}
    Path(request["out"]).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()

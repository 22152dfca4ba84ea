"""Speed of prepare on long agent conversations, compared with short conversations.

    python -m tests.bench.data MODEL GSM8K agents

The rows consist of texts of GSM8K. A short row is a question and its answer. A long row is one task
and 1,000 turns, alternately an assistant turn with reasoning and a tool call, and the tool's
result.
"""

import json
import shutil
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.data.prepare.prepare import prepare_data
from tests import ROOT

TURNS, LONG_ROWS, SHORT_ROWS = 1000, 8, 4000
TEMPLATE = ROOT / "tests" / "templates" / "qwen3.jinja"  # writes calls and reasoning
TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Calculate.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


def agents(model: Path, gsm8k: Path, folder: Path) -> None:
    """Print the speed for short and long rows: one process, the best of three runs each."""
    tokenizer = folder / "tokenizer"
    shutil.copytree(model, tokenizer, ignore=shutil.ignore_patterns("*.safetensors"))
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE.read_text(encoding="utf-8"))
    with gsm8k.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    costs = {}  # kind of the rows -> seconds and CPU seconds of a token
    for kind, values in (("short", short_rows(rows)), ("long", long_rows(rows))):
        data = folder / f"{kind}-rows.jsonl"
        data.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
        runs = [_cost_per_token(tokenizer, data, folder / f"{kind}-{i}") for i in range(3)]
        costs[kind] = tuple(map(min, zip(*runs, strict=True)))
    for index, unit in enumerate(("second", "CPU second")):
        short, long = costs["short"][index], costs["long"][index]
        print(
            f"agents    tokens per {unit}: {LONG_ROWS} rows of {TURNS:,} turns {1 / long:,.0f}, "
            f"{SHORT_ROWS:,} rows of 2 turns {1 / short:,.0f}; "
            f"a token of a long row costs {long / short:.2f} times as much",
            flush=True,
        )


def _cost_per_token(model: Path, data: Path, run: Path) -> tuple[float, float]:
    """Seconds, and CPU seconds of all threads, for each token of the prepared data."""
    settings = RunSettings(
        model=str(model), train_data=str(data), output_dir=str(run), max_length=2**20, packing=False
    )
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens = prepare_data(settings, run / "data", processes=1).train.tokens
    return (time.perf_counter() - start) / tokens, (time.process_time() - cpu_start) / tokens


def short_rows(rows: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Rows of two turns: a question and its answer."""
    for row in islice(cycle(rows), SHORT_ROWS):
        turns = (("user", row["question"]), ("assistant", row["answer"]))
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def long_rows(rows: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Rows of one task and TURNS turns: assistant turns with reasoning and a call, and results."""
    texts = cycle(rows)
    for number in range(LONG_ROWS):
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"Task {number}."}]
        for index, row in enumerate(islice(texts, TURNS // 2)):  # a call and its result
            arguments = {"expression": row["answer"]}
            function = {"name": "calculate", "arguments": arguments}
            call = {"id": f"call{index:05}", "type": "function", "function": function}
            messages.append(
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": row["question"],
                    "tool_calls": [call],
                }
            )
            result = {"role": "tool", "tool_call_id": call["id"], "content": row["answer"]}
            messages.append(result)
        messages.append({"role": "assistant", "content": "Done.", "reasoning_content": "All done."})
        yield {"messages": messages, "tools": [TOOL]}

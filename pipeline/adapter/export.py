"""Export of an adapter and its merged model as GGUF files, by the converters of llama.cpp."""

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
from pipeline.adapter.trained_on import corrects_quantisation
from pipeline.cluster.progress import show_progress
from pipeline.errors import RankZeroError, UserError
from pipeline.files import atomic_folder, dump_json, read_json

logger = logging.getLogger(__name__)

LLAMA_CPP = "LLAMA_CPP_DIR"  # environment variable with the source folder of llama.cpp
QUANTISATIONS = ("q8_0", "q4_k_m")
_ADAPTER, _MODELFILE = "adapter.gguf", "Modelfile"
_EXPORTED_FILE = re.compile(r"adapter\.gguf|model(-q8_0|-q4_k_m)?\.gguf|Modelfile")
_LLAMA_CPP_REMEDY = (  # end of a message about missing programs
    "get llama.cpp with `git clone https://github.com/ggml-org/llama.cpp`, or from the source of "
    "llama-cpp-python (`pip download --no-deps --no-binary :all: llama-cpp-python`, folder "
    f"vendor/llama.cpp), and name its folder with --llama-cpp or {LLAMA_CPP}"
)
_SHOWN_LINES = 8  # last lines of a failed program's output


@dataclass(frozen=True, kw_only=True)
class LlamaCpp:
    """Paths of llama.cpp's programs. `quantiser`: None if no quantisation was requested."""

    model_converter: Path
    adapter_converter: Path
    quantiser: str | None


@dataclass(frozen=True, kw_only=True)
class GgufSources:
    """Folders with the base, the adapter and the merged model."""

    base: Path
    adapter: Path
    merged: Path
    trust_remote_code: bool = False


def find_llama_cpp(folder: Path | None, quantisation: str | None) -> LlamaCpp:
    """Find llama.cpp's programs in `folder`, by default $LLAMA_CPP_DIR.

    `quantisation`: the requested quantisation, such as q8_0, which needs llama-quantize. This
    program may also be in build/bin of the folder or in PATH. Raises UserError for a program or
    library that is missing, with the command that installs it.
    """
    if folder is None and os.environ.get(LLAMA_CPP):
        folder = Path(os.environ[LLAMA_CPP])
    if folder is None:
        raise UserError(f"--gguf needs llama.cpp's converters: {_LLAMA_CPP_REMEDY}")
    scripts = [folder / name for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")]
    for script in scripts:
        if not script.is_file():
            raise UserError(f"{folder} has no {script.name}: {_LLAMA_CPP_REMEDY}")
    if importlib.util.find_spec("sentencepiece") is None:
        raise UserError("llama.cpp's converters need sentencepiece: pip install 'rankzero[gguf]'")
    quantiser = None
    if quantisation is not None:
        name, build = "llama-quantize", folder / "build"
        quantiser = shutil.which(name, path=f"{folder}:{build / 'bin'}") or shutil.which(name)
        if quantiser is None:
            raise UserError(
                f"--quantize needs {name}, which is neither in {folder}, nor in its build/bin, nor "
                f"in PATH; build it: cmake -S {folder} -B {build} && cmake --build {build} "
                f"--target {name}"
            )
    return LlamaCpp(model_converter=scripts[0], adapter_converter=scripts[1], quantiser=quantiser)


def export_gguf(
    tools: LlamaCpp, sources: GgufSources, out: Path, quantisation: str | None, modelfile: str
) -> list[Path]:
    """Write the GGUF files and the Modelfile into `out`, which replaces an earlier export.

    `modelfile`: content of the Modelfile, in which {model} stands for the file name of the model.
    An adapter that llama.cpp cannot represent is left out with a warning; the merged model contains
    its weights. Returns the paths of all files.
    """
    _require_only_exported_files(out)
    adapter = read_adapter(sources.adapter)
    reason = why_not_in_gguf(adapter)
    if corrects_quantisation(sources.adapter):
        reason = "it also corrects the 4-bit base of the training (init_lora_weights: loftq)"
    model_name = "model.gguf" if quantisation is None else f"model-{quantisation}.gguf"
    try:
        with atomic_folder(out, lambda _: None) as temporary:
            if reason:
                logger.warning("%s is not written: %s", _ADAPTER, reason)
            else:
                _convert_adapter(tools, sources, adapter, temporary)
            options = ["--trust-remote-code"] if sources.trust_remote_code else []
            command = [sys.executable, str(tools.model_converter), str(sources.merged), *options]
            _run([*command, "--outfile", str(temporary / "model.gguf"), "--outtype", "auto"])
            if quantisation is not None:
                assert tools.quantiser is not None
                files = [str(temporary / "model.gguf"), str(temporary / model_name)]
                _run([tools.quantiser, *files, quantisation.upper()])
                (temporary / "model.gguf").unlink()
            # Only the first {model} is replaced, because the chat template may contain this text.
            text = modelfile.replace("{model}", model_name, 1)
            (temporary / _MODELFILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RankZeroError(f"{out}: the export cannot be written: {error}") from error
    return sorted(out.iterdir())


def why_not_in_gguf(adapter: Adapter) -> str:
    """Why llama.cpp cannot represent this adapter as a LoRA file; empty if it can."""
    if any("magnitude" in update.tensors for update in adapter.layer_updates.values()):
        return "llama.cpp does not support DoRA"
    if adapter.value_updates:
        name = next(iter(adapter.value_updates))
        return f"a LoRA file of llama.cpp cannot have trained values of {name}"
    if adapter.fused_experts:
        return "llama.cpp's converter does not read adapters of fused experts"
    return ""


def _convert_adapter(tools: LlamaCpp, sources: GgufSources, adapter: Adapter, out: Path) -> None:
    """Convert a copy of the adapter in which each layer's scaling is alpha / r."""
    copy = out / "plain"
    copy.mkdir()
    write_with_plain_scaling(adapter, copy)
    options = ["--base", str(sources.base), "--outfile", str(out / _ADAPTER), "--outtype", "f32"]
    options += ["--trust-remote-code"] if sources.trust_remote_code else []
    _run([sys.executable, str(tools.adapter_converter), *options, str(copy)])
    shutil.rmtree(copy)


def write_with_plain_scaling(adapter: Adapter, folder: Path) -> None:
    """Write the adapter with one lora_alpha and without options that change the scaling.

    llama.cpp scales a layer by lora_alpha / r. If peft scales a layer by another factor (rsLoRA,
    alpha_pattern), its B is multiplied by the quotient of peft's factor and that of llama.cpp.
    """
    from safetensors.torch import load_file, save_file  # imports torch

    alpha = float(adapter.config["lora_alpha"])
    tensors = load_file(adapter.file.path)
    key_by_offset = {entry.start: key for key, entry in adapter.file.entries.items()}
    for update in adapter.layer_updates.values():
        factor = update.scaling / (alpha / update.r)
        if factor != 1:
            key = key_by_offset[update.tensors["B"].start]
            tensors[key] = tensors[key].float() * factor
    save_file(tensors, folder / adapter.file.path.name, metadata={"format": "pt"})
    config = read_json(adapter.folder / "adapter_config.json")
    config |= {"use_rslora": False, "alpha_pattern": {}, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(dump_json(config), encoding="utf-8")


def _require_only_exported_files(out: Path) -> None:
    """Raise UserError if `out` has files that no export wrote; an export would remove them."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; move it")
    others = [path.name for path in out.glob("*") if not _EXPORTED_FILE.fullmatch(path.name)]
    if others:
        raise UserError(f"{out} has a file that no export wrote, {others[0]}; move it")


def _run(command: Sequence[str]) -> None:
    """Run a program of llama.cpp. Raises RankZeroError with the end of its output if it fails."""
    logger.info("%s", " ".join(Path(word).name if "/" in word else word for word in command))
    try:
        with show_progress("converting"):
            result = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                errors="replace",
            )  # fmt: skip
    except OSError as error:
        raise RankZeroError(f"{command[0]} cannot be started: {error}") from error
    if result.returncode != 0:
        end = "\n".join(result.stdout.strip().splitlines()[-_SHOWN_LINES:])
        program = next(word for word in command if "python" not in Path(word).name)
        raise RankZeroError(f"{program} failed with exit code {result.returncode}:\n{end}")

"""Print the command that serves a run's adapter with vLLM; write GGUF files for llama.cpp, Ollama.

    {command} RUN_FOLDER
    {command} RUN_FOLDER --gguf [--quantize q8_0|q4_k_m] [--llama-cpp DIR]

--gguf writes RUN_FOLDER/gguf: the adapter, the merged model and a Modelfile for Ollama. It runs
llama.cpp's own converters and quantiser from DIR, by default $LLAMA_CPP_DIR.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.adapter.adapter_file import require_adapter
from pipeline.adapter.export import (
    LLAMA_CPP,
    QUANTISATIONS,
    GgufSources,
    export_gguf,
    find_llama_cpp,
)
from pipeline.adapter.ollama import Message, go_template, modelfile
from pipeline.adapter.products import is_merged_from
from pipeline.adapter.serving import vllm_command
from pipeline.adapter.trained_on import corrects_quantisation, require_same_base
from pipeline.cli.arguments import Parser, run_settings
from pipeline.cluster.exits import run_main
from pipeline.commands import command
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError

logger = logging.getLogger(__name__)


def export() -> None:
    """Parse the command line, write the files, and print the commands that serve them."""
    parser = Parser("export", help_template=__doc__)
    parser.add_run_folder()
    parser.add_argument("--gguf", action="store_true", help="write RUN_FOLDER/gguf")
    parser.add_argument(
        "--quantize", choices=QUANTISATIONS, help="quantise the merged model with llama-quantize"
    )
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="DIR", help=f"folder of llama.cpp (${LLAMA_CPP})"
    )
    args = parser.parse_args()
    run_folder: Path = args.run_folder
    settings = run_settings(run_folder)
    adapter = require_adapter(run_folder)
    if (args.quantize or args.llama_cpp) and not args.gguf:
        parser.error("--quantize and --llama-cpp need --gguf")
    merged = run_folder / "merged"
    # An adapter that corrects the errors of a 4-bit base (LoftQ) is wrong on the base that vLLM
    # would load, so vLLM serves the merged model.
    serves_merged = corrects_quantisation(adapter)
    serve = vllm_command(settings, str(adapter), str(merged), is_merged=serves_merged)
    print(f"vLLM       {serve}")
    if not args.gguf:
        return
    tools = find_llama_cpp(args.llama_cpp, args.quantize)
    require_merged(run_folder)
    require_same_base(settings.model_folder, adapter)
    sources = GgufSources(
        base=settings.model_folder,
        adapter=adapter,
        merged=merged,
        trust_remote_code=settings.trust_remote_code,
    )
    out = run_folder / "gguf"
    modelfile_text = _modelfile_text(settings, merged)
    for path in export_gguf(tools, sources, out, args.quantize, modelfile_text):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    merged_gguf = next(out.glob("model*.gguf"))
    print(f"llama.cpp  llama-server -m {merged_gguf} --jinja")
    print(f"Ollama     ollama create NAME -f {out / 'Modelfile'}")


def require_merged(run_folder: Path) -> None:
    """Raise UserError if a run has no merged model, or one merged from an earlier adapter."""
    merged = run_folder / "merged"
    if not (merged / "config.json").is_file():
        raise UserError(
            f"{run_folder} has no merged model; run {command('merge')} {run_folder} first"
        )
    if is_merged_from(run_folder) is False:
        raise UserError(
            f"{merged} was not merged from the present adapter; run {command('merge')} {run_folder}"
        )


def _modelfile_text(settings: RunSettings, merged: Path) -> str:
    """Ollama's Modelfile, with the tokens that end an answer and the trained chat template.

    Ollama's templates are Go templates. A chat template that has no equivalent Go template is left
    out, with a warning.
    """
    from pipeline.data.chat.encoder import Encoder  # imports tokenizers
    from pipeline.data.chat.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(merged, settings.trust_remote_code)
    end_ids = sorted(Encoder(tokenizer, settings).end_ids)
    template = None
    if tokenizer.chat_template is not None:

        def render(chat: Sequence[Message]) -> str:
            """The conversation as the trained chat template renders it."""
            text = tokenizer.apply_chat_template(
                list(chat),
                tokenize=False,
                add_generation_prompt=True,
                **settings.chat_template_kwargs,
            )
            return str(text)

        # Reads the Go template off rendered sample conversations, and checks it on others.
        template = go_template(render)
    if template is None:
        logger.warning(
            "Modelfile: the chat template has no equivalent in Ollama's language that could be "
            "checked; llama.cpp's server evaluates the template itself (--jinja)"
        )
    stops = [str(tokenizer.convert_ids_to_tokens(end_id)) for end_id in end_ids]
    # export_gguf replaces {model} by the name of the GGUF file.
    return modelfile("{model}", template, stops)


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(export)


if __name__ == "__main__":
    main()

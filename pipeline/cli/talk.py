"""Talk to the base and the adapter of a run: both answer each prompt.

{command} RUN_FOLDER
echo "two rye loaves, please" | {command} RUN_FOLDER

Ctrl-C stops an answer, and the end of input (Ctrl-D) ends the program. The chat template and the
tokens that end an answer are those of training. Answers are greedy, as in the verb score.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from pipeline.cli.arguments import Parser, count, require_folder
from pipeline.cli.score import let_waiting_threads_sleep
from pipeline.cluster.devices import detect_hardware, set_environment
from pipeline.cluster.exits import run_main
from pipeline.cluster.placement import Placement
from pipeline.cluster.progress import show_progress
from pipeline.cluster.session import Session
from pipeline.errors import UserError
from pipeline.evaluate.model_specs import model_specs

if TYPE_CHECKING:
    from pipeline.evaluate.talk import Talk

_COMMANDS = (
    "/reset forgets the conversation, /system TEXT sets a system prompt and resets, /quit or "
    "Ctrl-D ends; Ctrl-C stops an answer"
)


def talk() -> None:
    """Parse the command line, load the model, and answer prompts until the input ends."""
    parser = Parser("talk", help_template=__doc__)
    parser.add_run_folder()
    parser.add_argument(
        "--max-new-tokens", type=count, default=512, metavar="N", help="longest answer (512 tokens)"
    )
    args = parser.parse_args()
    require_folder(args.run_folder)
    let_waiting_threads_sleep()
    specs = model_specs([str(args.run_folder)], (), None, with_merged=False)
    if specs[0].adapter is None:
        raise UserError(f"{args.run_folder}: is a model; give the output_dir of a run")
    hardware = detect_hardware()
    single_process = Placement()
    set_environment(single_process, hardware)
    with show_progress("importing PyTorch"):
        from pipeline.evaluate.loading import ModelLoader
        from pipeline.evaluate.talk import Talk

    loader = ModelLoader(Session(single_process, hardware).device)
    conversation = Talk(specs, loader, args.max_new_tokens)
    conversation.load()
    print(_COMMANDS)
    if not conversation.is_chat:
        print("the run was trained on prompts with completions: each prompt stands alone")
    for text in _prompts():
        if text == "/quit":
            return
        _respond(conversation, text)


def _prompts() -> Iterator[str]:
    """The lines of the input that are not blank. In a terminal they can be edited and recalled."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - input() uses it
    with suppress(AttributeError):
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)")
            continue
        if not is_terminal:
            print(text)  # a transcript shows the prompts
        if text:
            yield text


def _respond(conversation: "Talk", text: str) -> None:
    """Run a command, or print the answers of base and adapter to a prompt."""
    command, _, rest = text.partition(" ")
    if command in ("/reset", "/system"):
        conversation.reset()
        if command == "/system":
            conversation.system = rest.strip()
        return
    if command.startswith("/"):
        print(_COMMANDS)
        return
    for name in ("base", "adapter"):
        print(f"{name}: ", end="", flush=True)
        try:
            is_complete = conversation.answer(name, text, _write)
        except UserError as error:
            print(error)
            return
        print("" if is_complete else " [stopped]", flush=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(talk)


if __name__ == "__main__":
    main()

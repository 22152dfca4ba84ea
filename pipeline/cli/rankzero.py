"""`rankzero VERB ...`: the commands of an installed package; see `rankzero VERB --help`.

On a machine with several GPUs, `rankzero train`, `preflight` and `score` start the `deepspeed`
command, unless a launcher has started them.
"""

import os
import sys
from importlib import import_module

from pipeline.cluster.exits import run_main
from pipeline.errors import UserError

VERBS = {
    "plan": "memory, time and layout of a run; which models fit a GPU",
    "prepare": "tokenise the data, and report on every row",
    "preflight": "check machines, network and disk before training",
    "train": "train an adapter; the same command resumes it",
    "merge": "add an adapter to its base",
    "score": "compare base, adapter and merged model on held-out rows",
    "talk": "type prompts; base and adapter answer",
    "report": "write the report of a run, or compare runs",
    "export": "how to serve a run; GGUF files for llama.cpp and Ollama",
    "publish": "upload an adapter to the hub",
    "track": "send what a tracker has not received yet",
    "convert": "convert the configuration of another program",
    "slurm": "write the batch scripts for Slurm",
}
_VERBS_ON_ALL_GPUS = ("train", "preflight", "score")
# With these options the verbs above run in one process.
_SINGLE_PROCESS_OPTIONS = {"-h", "--help", "--debug", "--tasks"}


def main() -> None:
    """Run the verb that the first argument names; only its module is imported."""
    verb = " ".join(sys.argv[1:2])
    if verb not in VERBS:
        run_main(lambda: _show_usage(verb))
    options = {word.partition("=")[0] for word in sys.argv[2:]}
    is_single_process = bool(_SINGLE_PROCESS_OPTIONS & options)
    if verb in _VERBS_ON_ALL_GPUS and not is_single_process and _has_unused_gpus():
        command = deepspeed_command(verb, sys.argv[2:])
        words = command[3:]  # those after: python -m pipeline.cluster.deepspeed_command
        print(f"rankzero: several GPUs; starting {' '.join(['deepspeed', *words])}")
        sys.stdout.flush()
        os.execv(command[0], command)
    sys.argv[:2] = [f"rankzero {verb}"]  # the name that usage messages show
    import_module(f"pipeline.cli.{verb}").main()


def _show_usage(verb: str) -> None:
    """Print the usage if it was asked for; else raise UserError, because `verb` is not a verb."""
    if verb not in ("-h", "--help"):
        problem = f"{verb!r} is not a verb" if verb else "the verb is missing"
        raise UserError(f"rankzero: {problem}\n{_usage()}")
    print(_usage())


def _usage() -> str:
    lines = [f"  {verb:<10} {summary}" for verb, summary in VERBS.items()]
    return "\n".join(["usage: rankzero VERB ...; rankzero VERB --help", *lines])


def deepspeed_command(verb: str, arguments: list[str]) -> list[str]:
    """Command line that runs a verb on all visible GPUs with DeepSpeed's launcher."""
    runner = [sys.executable, "-m", "pipeline.cluster.deepspeed_command"]
    quiet = [] if "--verbose" in arguments else ["--quiet"]
    return [*runner, *quiet, "--module", f"pipeline.cli.{verb}", *arguments]


def _has_unused_gpus() -> bool:
    """Whether this machine has several GPUs, and no launcher has started a process for each."""
    from pipeline.cluster.devices import detect_hardware
    from pipeline.cluster.placement import from_environment

    try:
        is_alone = from_environment(os.environ).launcher == "one process"
        return is_alone and detect_hardware().devices_per_node > 1
    except UserError:
        return False  # the verb reports the same error


if __name__ == "__main__":
    main()

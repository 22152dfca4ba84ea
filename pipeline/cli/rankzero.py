"""`rankzero VERB ...`: the commands of an installed package; see `rankzero VERB --help`.

On a machine with several GPUs, `rankzero train`, `preflight` and `score` start the `deepspeed`
command, unless a launcher has started them.
"""

import os
import sys
from importlib import import_module

VERBS = (
    "train", "plan", "prepare", "preflight", "merge", "export", "publish", "score", "talk",
    "report", "track", "convert", "slurm",
)  # fmt: skip
_VERBS_ON_ALL_GPUS = ("train", "preflight", "score")
_SINGLE_PROCESS_OPTIONS = {"-h", "--help", "--debug", "--tasks"}


def main() -> None:
    """Run the verb that the first argument names; only its module is imported."""
    verb, usage = " ".join(sys.argv[1:2]), f"rankzero {{{','.join(VERBS)}}} ..."
    if verb in ("-h", "--help"):
        print(f"usage: {usage}")
        return
    if verb not in VERBS:
        print(f"rankzero: {verb!r} is not a verb; usage: {usage}", file=sys.stderr)
        sys.exit(2)
    is_single = bool(_SINGLE_PROCESS_OPTIONS & {word.partition("=")[0] for word in sys.argv[2:]})
    if verb in _VERBS_ON_ALL_GPUS and not is_single and _has_idle_gpus():
        command = deepspeed_command(verb, sys.argv[2:])
        print(f"rankzero: several GPUs; starting {' '.join(['deepspeed', *command[3:]])}")
        sys.stdout.flush()
        os.execv(command[0], command)
    sys.argv[:2] = [f"rankzero {verb}"]
    import_module(f"pipeline.cli.{verb}").main()


def deepspeed_command(verb: str, arguments: list[str]) -> list[str]:
    """Command line that runs a verb on all visible GPUs with DeepSpeed's launcher."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
    quiet = [] if "--verbose" in arguments else ["--quiet"]
    return [*runner, *quiet, "--module", f"pipeline.cli.{verb}", *arguments]


def _has_idle_gpus() -> bool:
    """Whether this process is the only one of its run on a machine with several GPUs."""
    from pipeline.cluster.devices import detect_hardware
    from pipeline.cluster.placement import from_environment
    from pipeline.errors import UserError

    try:
        is_alone = from_environment(os.environ).launcher == "one process"
        return is_alone and detect_hardware().devices_per_node > 1
    except UserError:
        return False  # the verb itself reports it


if __name__ == "__main__":
    main()

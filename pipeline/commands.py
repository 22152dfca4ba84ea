"""Commands that run a verb, for messages, in the form in which the user started this program."""

import shlex
import sys
from pathlib import Path


def command(verb: str) -> str:
    """Command line of a verb in one process: `python launch/VERB.py` or `rankzero VERB`.

    Only a clone has the scripts of launch/, so they are named only if one of them was started.
    """
    return f"python {script(verb)}" if _is_script_of_clone() else f"rankzero {verb}"


def script(verb: str) -> str:
    """The words that name a verb to `deepspeed`, `torchrun` and `accelerate launch`."""
    if _is_script_of_clone():
        return shlex.quote(str(Path(sys.argv[0]).with_name(f"{verb}.py")))
    return f"--module pipeline.cli.{verb}"


def _is_script_of_clone() -> bool:
    path = Path(sys.argv[0])
    return path.suffix == ".py" and path.absolute().parent.name == "launch"

"""Names of commands and pages, for messages, as the user of this installation finds them."""

import shlex
import sys
from pathlib import Path

_PAGES = Path(__file__).with_name("pages")  # in a clone a link to docs/, in a wheel a copy
# Folder of the pages that messages name, such as docs/rules.md.
DOCS = "docs" if _PAGES.is_symlink() else str(_PAGES)


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

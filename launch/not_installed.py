"""Message of a script whose Python lacks RankZero or one of its dependencies.

The scripts import this module only in that case, so it imports nothing but the standard library.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn


def exit_with_advice(error: ModuleNotFoundError) -> NoReturn:
    """End the process with exit code 2; local rank 0 prints what to run."""
    clone = Path(__file__).resolve().parents[1]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"{sys.argv[0]}: {sys.executable} has no module {error.name!r}, so RankZero is not "
            f"installed for this Python. Run `make -C {clone} install` and "
            f"`source {clone}/.venv/bin/activate`, then the same command again",
            file=sys.stderr,
        )
    sys.exit(2)

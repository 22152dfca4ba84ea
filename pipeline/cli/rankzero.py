"""`rankzero VERB ...`: the verbs of an installed package; `rankzero VERB --help` explains one.

train and preflight on several ranks: `deepspeed --module pipeline.cli.train RUN.yaml`.
"""

import sys
from importlib import import_module

VERBS = ("train", "plan", "prepare", "preflight", "merge", "score", "report")


def main() -> None:
    """Run the verb that the first argument names; only its module is imported."""
    verb, usage = " ".join(sys.argv[1:2]), f"rankzero {{{','.join(VERBS)}}} ..."
    if verb in ("-h", "--help"):
        print(f"usage: {usage}")
        return
    if verb not in VERBS:
        print(f"rankzero: {verb!r} is not a verb; usage: {usage}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"rankzero {verb}"]
    import_module(f"pipeline.cli.{verb}").main()


if __name__ == "__main__":
    main()

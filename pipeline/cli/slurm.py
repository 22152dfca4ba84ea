"""Write the batch scripts of slurm/ into a folder, for an installed package without a clone.

    {command} FOLDER        then: sbatch FOLDER/slurm/train.sbatch RUN.yaml

Change FOLDER/slurm/env.sh for your cluster. An existing file is never replaced.
"""

from pathlib import Path

from pipeline.cli.arguments import Parser
from pipeline.cluster.exits import run_main
from pipeline.errors import UserError
from pipeline.files import write_text

_SCRIPTS = Path(__file__).parent / "slurm_scripts"
_NAMES = ("train.sbatch", "debug.sbatch", "env.sh", "README.md")


def slurm() -> None:
    """Parse the command line, write the scripts and print the next step."""
    parser = Parser("slurm", help_template=__doc__)
    parser.add_argument("folder", type=Path, help="folder for slurm/; created if it is missing")
    folder = parser.parse_args().folder / "slurm"
    texts = {folder / name: (_SCRIPTS / name).read_text(encoding="utf-8") for name in _NAMES}
    if changed := [path for path, text in texts.items() if _differs(path, text)]:
        raise UserError(
            f"{changed[0]} exists and differs from the file of this package; move it, or name "
            "another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            write_text(path, text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    print(f"wrote {folder}; set it up for the cluster: {folder / 'env.sh'}")
    options = "--nodes=1 --gpus-per-node=8 --cpus-per-gpu=4"
    print(f"submit  sbatch {options} {folder / 'train.sbatch'} RUN.yaml")


def _differs(path: Path, text: str) -> bool:
    """Whether the file exists and its content is not `text`."""
    try:
        return path.read_text(encoding="utf-8") != text
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError):
        return True


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(slurm)


if __name__ == "__main__":
    main()

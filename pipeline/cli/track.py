"""Send the data of a run that its experiment trackers have not received yet.

    {command} RUN_FOLDER [--tracker NAME]

Training sends its metrics itself. This command sends the rest: metrics of steps at which a tracker
could not be reached, and scores that were computed after training. The settings `trackers`,
`tracker_project`, `run_name`, `run_group` and `tracker_uploads` of the run file apply.
"""

import argparse
import logging
import os
import select
import sys
from pathlib import Path

from pipeline.cli.arguments import Parser, run_settings
from pipeline.cluster.exits import end_process, run_main
from pipeline.errors import RankZeroError, UserError
from pipeline.track.follow import call_later, send_run
from pipeline.track.process import FINAL_SEND_S
from pipeline.track.trackers import TRACKERS

logger = logging.getLogger(__name__)


def track() -> None:
    """Parse the command line and send the run."""
    parser = Parser("track", help_template=__doc__)
    parser.add_run_folder()
    parser.add_argument(
        "--tracker", choices=TRACKERS, help="default: all of the setting `trackers`"
    )
    # Training starts this command with --follow, once for each tracker (track/process.py).
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = run_settings(args.run_folder)
    names = [args.tracker] if args.tracker else settings.trackers
    if not names:
        raise UserError(
            f"{args.run_folder}: the run has no trackers; name one with --tracker: "
            f"{', '.join(TRACKERS)}"
        )
    if args.follow:
        _send_during_training(args.run_folder, names[0])
        return
    for name in names:
        _send_once(args.run_folder, name)


def _send_once(folder: Path, name: str) -> None:
    """Send the data of a run that has ended to the tracker `name`."""
    try:
        # `wait` waits for new metrics, and returns whether training has ended.
        send_run(folder, name, wait=lambda seconds: True)
    except Exception as error:
        install = f"; pip install -e '.[{name}]'" if isinstance(error, ImportError) else ""
        raise RankZeroError(f"tracker {name}: {type(error).__name__}: {error}{install}") from error
    print(f"{name}: all data is sent; its log and state are in {folder / 'tracking'}")


def _send_during_training(folder: Path, name: str) -> None:
    """Send metrics while training writes them, and the results after it has ended.

    The training process starts this command, and closes its standard input when training ends. Then
    FINAL_SEND_S seconds remain to send the rest. A failure is printed once on the terminal; all
    other output, also that of the tracker's library, goes to RUN_FOLDER/tracking/NAME.log.
    """
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    log = folder / "tracking" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for output_stream in (1, 2):  # standard output, standard error
            os.dup2(file.fileno(), output_stream)

    def wait(seconds: float) -> bool:
        """Wait for the end of training, at most for these seconds; return whether it has ended."""
        has_ended = bool(select.select([sys.stdin], [], [], seconds)[0])
        if has_ended:
            call_later(FINAL_SEND_S, lambda: end_process(1))
        return has_ended

    try:
        send_run(folder, name, wait)
    except Exception as error:
        logger.exception("tracker %s", name)
        text = " ".join(str(error).split())[:300]
        print(
            f"tracker {name} failed and gets no more metrics; training continues. "
            f"{type(error).__name__}: {text} ({log})",
            file=terminal,
        )
        end_process(1)
    end_process(0)  # without joining the library's threads, which may never end


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(track)


if __name__ == "__main__":
    main()

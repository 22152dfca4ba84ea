"""The command `deepspeed`, without the traceback that it prints after Ctrl-C.

    python -m pipeline.cluster.deepspeed_command OPTIONS SCRIPT ...

A terminal sends the signal of Ctrl-C to the ranks too, which stop with a checkpoint. The command of
DeepSpeed 0.19.8 does not wait for them and ends with a traceback. This one waits.
"""

import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import psutil


def main() -> NoReturn:
    """Run DeepSpeed's command with the arguments of this process."""
    # An interrupt can be lost in a finaliser; then DeepSpeed's command ends with its child's code.
    interrupts: list[int] = []  # signals received

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        from deepspeed.launcher.runner import main as deepspeed_command

        deepspeed_command()
    except (KeyboardInterrupt, SystemExit):
        if not interrupts:
            raise
        while children := psutil.Process().children():
            with suppress(KeyboardInterrupt):  # a second Ctrl-C ends the ranks at once
                psutil.wait_procs(children)
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)


if __name__ == "__main__":
    main()

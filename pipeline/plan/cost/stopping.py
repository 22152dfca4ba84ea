"""Time to stop a run: can it save a checkpoint before its launcher kills it?"""

# Seconds between SIGTERM and SIGKILL of DeepSpeed's launcher (0.19.8 launcher/launch.py).
LAUNCHER_PATIENCE_S = 30.0


def slow_stop_warning(save_s: float, micro_batch_s: float) -> str | None:
    """A warning if one save and one micro-batch take longer than a launcher waits, else None."""
    if save_s + micro_batch_s <= LAUNCHER_PATIENCE_S:
        return None
    return (
        f"a stop takes a save and a micro-batch, {save_s:.0f} + {micro_batch_s:.0f} s, and "
        f"DeepSpeed's launcher kills a rank {LAUNCHER_PATIENCE_S:.0f} s after Ctrl-C or SIGTERM: "
        "stop this run with its `stop` file, or lower save_steps to lose less"
    )

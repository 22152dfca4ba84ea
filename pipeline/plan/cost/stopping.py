"""Whether a run can save a checkpoint before its launcher kills it."""

# DeepSpeed's launcher terminates rank 0, and kills it after so long (0.19.8 launcher/launch.py).
LAUNCHER_PATIENCE_S = 30.0


def slow_stop_warning(save_s: float, micro_batch_s: float) -> str | None:
    """A warning where one save and one micro-batch take longer than a launcher waits, else None."""
    if save_s + micro_batch_s <= LAUNCHER_PATIENCE_S:
        return None
    return (
        f"a stop takes a save and a micro-batch, {save_s:.0f} + {micro_batch_s:.0f} s, and "
        f"DeepSpeed's launcher kills a rank {LAUNCHER_PATIENCE_S:.0f} s after Ctrl-C or SIGTERM: "
        "stop this run with its `stop` file, or lower save_steps to lose less"
    )

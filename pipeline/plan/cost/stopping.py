"""Warning about a run that cannot save a checkpoint before its launcher kills it."""

# Seconds between SIGTERM and SIGKILL of DeepSpeed's launcher (0.19.8 launcher/launch.py).
LAUNCHER_PATIENCE_S = 30.0


def slow_stop_warning(save_s: float, micro_batch_s: float) -> str | None:
    """A warning if one save and one micro-batch take longer than the launcher waits, else None."""
    if save_s + micro_batch_s <= LAUNCHER_PATIENCE_S:
        return None
    return (
        f"a stop takes up to {save_s:.0f} s for saving and {micro_batch_s:.0f} s for a "
        f"micro-batch, but DeepSpeed's launcher kills a rank {LAUNCHER_PATIENCE_S:.0f} s after "
        "Ctrl-C or SIGTERM: stop this run with its `stop` file, or lower save_steps, so that a "
        "kill loses fewer steps"
    )

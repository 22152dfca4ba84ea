"""Warning about a run that may be killed before it has saved a checkpoint.

After Ctrl-C or SIGTERM, the ranks first agree to stop at the same micro-batch, and then save a
checkpoint. DeepSpeed's launcher kills them if this takes too long.
"""

# Seconds between SIGTERM and SIGKILL of DeepSpeed's launcher (0.19.8 launcher/launch.py).
LAUNCHER_PATIENCE_S = 30.0
# Before each step the ranks agree whether to stop. In a step that takes longer than this, they also
# agree about once in this time, between two micro-batches.
STOP_INTERVAL_S = 5.0


def slow_stop_warning(save_s: float, micro_batch_s: float) -> str | None:
    """A warning if agreement and save take longer than the launcher waits, else None.

    `save_s`: seconds to save a checkpoint. `micro_batch_s`: seconds of a micro-batch.
    """
    agreement_s = max(micro_batch_s, STOP_INTERVAL_S)
    if save_s + agreement_s <= LAUNCHER_PATIENCE_S:
        return None
    return (
        f"a stop takes up to {agreement_s:.0f} s until the ranks agree on it and {save_s:.0f} s "
        f"for saving, but DeepSpeed's launcher kills a rank {LAUNCHER_PATIENCE_S:.0f} s after "
        "Ctrl-C or SIGTERM: stop this run with its `stop` file, or lower save_steps, so that a "
        "kill loses fewer steps"
    )

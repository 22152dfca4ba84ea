"""RunContext: the state of a run on one rank that needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cluster.heartbeat import Heartbeat
from pipeline.cluster.session import Session
from pipeline.cluster.stop import StopRequests
from pipeline.config.settings import RunSettings
from pipeline.files import read_json_or_empty
from pipeline.plan.plan import Plan

_DEBUG_STEPS = 4


@dataclass(kw_only=True)
class RunContext:
    """The state of a run on one rank. `plan` gets a schedule when the data has been prepared."""

    plan: Plan
    session: Session
    stops: StopRequests
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    is_debug: bool = False

    @property
    def settings(self) -> RunSettings:
        """The settings, with the values that the plan chose."""
        return self.plan.settings

    @property
    def folder(self) -> Path:
        """The path of the run folder."""
        return Path(self.settings.output_dir)


def debug_settings(settings: RunSettings, world_size: int) -> RunSettings:
    """The settings for `--debug`: a few steps in a separate folder, with a log line for each."""
    # Settings that need several ranks are reset on one rank.
    reset = ("sequence_parallel_size", "hpz_partition_size") if world_size == 1 else ()
    # If global_batch_size is set, the plan chooses the accumulation steps that reach this size,
    # because --debug may have fewer ranks than the real run.
    has_global_batch_size = settings.global_batch_size != "auto"
    accumulation = "auto" if has_global_batch_size else settings.gradient_accumulation_steps
    return settings.model_copy(
        update={
            "output_dir": f"{settings.output_dir.rstrip('/')}-debug",
            "max_steps": min(settings.max_steps or _DEBUG_STEPS, _DEBUG_STEPS),
            "logging_steps": 1,
            "resume": "never",
            "gradient_accumulation_steps": accumulation,
            **dict.fromkeys(reset, "auto"),
        }
    )


def requeued_settings(settings: RunSettings, env: Mapping[str, str]) -> RunSettings:
    """The settings for a Slurm job that was requeued.

    `resume: never` becomes `resume: auto` if this job wrote the run folder before it was requeued.
    """
    if settings.resume != "never" or env.get("SLURM_RESTART_COUNT", "0") == "0":
        return settings
    job = read_json_or_empty(Path(settings.output_dir) / "plan.json").get("job")
    was_written_by_job = job is not None and job == env.get("SLURM_JOB_ID")
    return settings.model_copy(update={"resume": "auto"}) if was_written_by_job else settings

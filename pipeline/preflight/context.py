"""`RankContext`: what the probe of a preflight check gets on one rank.

It holds the rank's settings, plan, devices, and session, which is its connection to other ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from pipeline.cluster.placement import Placement
from pipeline.cluster.session import Session
from pipeline.config.load import load_settings
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.plan import Plan, plan_run


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """The input of a probe: the run to check, as read by one rank.

    `problems`: the error message under "settings" or "plan" that explains why that field is None.
    `beat`: called with the name of the next phase. It is the heartbeat that the watchdog observes.
    `missing_gpus`: an environment variable with its value, such as `CUDA_VISIBLE_DEVICES=0`, that
    assigns GPUs to this process although the driver detects none. `is_training`: whether this is
    the check at the start of training. A single process then probes only its first GPU; in
    the verb preflight it probes all GPUs.
    """

    placement: Placement
    hardware: Hardware
    session: Session
    settings: RunSettings | None = None
    plan: Plan | None = None
    problems: dict[str, str] = field(default_factory=dict)
    beat: Callable[[str], None] = lambda phase: None
    missing_gpus: str | None = None
    is_training: bool = False

    def with_run(self, run_file: Path, overrides: Sequence[str]) -> Self:
        """A copy with the settings and the plan of a run file.

        An error is recorded in `problems` instead of raised. If it were raised on one rank (each
        node may have its own file), the other ranks would wait for that rank. Without a launcher,
        the plan is for all devices of this node, as if `deepspeed` had started the run.
        """
        is_single = self.placement.world_size == 1
        ranks = self.hardware.devices_per_node if is_single else self.placement.local_size
        try:
            settings = load_settings(run_file, overrides)
        except UserError as error:
            return replace(self, problems={"settings": str(error)})
        try:
            plan = plan_run(
                settings, self.hardware, nodes=self.placement.nodes, ranks_per_node=ranks
            )
        except UserError as error:
            return replace(self, settings=settings, problems={"plan": str(error)})
        return replace(self, settings=settings, plan=plan)

    @property
    def known_settings(self) -> RunSettings:
        """The settings. Raises UserError with the recorded message if they could not be read."""
        if self.settings is None:
            raise UserError(self.problems["settings"])
        return self.settings

    @property
    def known_plan(self) -> Plan:
        """The plan. Raises UserError with the recorded message if it could not be computed."""
        if self.plan is None:
            raise UserError(self.problems["plan"])
        return self.plan

    @property
    def model_folder(self) -> Path:
        """The folder of the base model."""
        return self.known_settings.model_folder

    @property
    def run_folder(self) -> Path:
        """The run folder."""
        return Path(self.known_settings.output_dir)

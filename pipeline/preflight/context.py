"""RankContext: the input of a probe, with the settings, plan, devices and session of one rank."""

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

    `problems`: error messages that explain why `settings` or `plan` is None. `beat`: called with
    the name of the next phase, for the watchdog. `missing_gpus`: environment variable with its
    value, such as `CUDA_VISIBLE_DEVICES=0`, that assigns GPUs to this process although the driver
    detects none (devices.py). `is_training`: whether this is the check at the start of training.
    Then a single process probes only its first GPU; launch/preflight.py probes all GPUs.
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

        An error is recorded in `problems` and not raised: ranks may read different files, and the
        ranks without an error would wait for this one. Without a launcher, the plan is for all
        devices of this node, as if `deepspeed` had started the run.
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
        """The folder of the base."""
        return self.known_settings.model_folder

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.known_settings.output_dir)

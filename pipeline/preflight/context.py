"""What a probe works on: one rank's view of the run that is to be started."""

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
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import Plan, make_plan


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """A run as one rank sees it. Where settings or plan are None, `problems` has the reason.

    `beat` is called with the name of the next phase, for the watchdog. `missing_gpus`: see
    devices.py. A single process trains on its first GPU; a preflight of it probes all GPUs, unless
    `is_training`.
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
        """The same with the settings and the plan of a run file.

        An error in them becomes a problem and is not raised: other ranks may read another file,
        and would wait. Without a launcher the plan is for every device of this machine, as
        `deepspeed` would start it.
        """
        is_single = self.placement.world_size == 1
        ranks = self.hardware.devices_per_node if is_single else self.placement.local_size
        try:
            settings = load_settings(run_file, overrides)
        except UserError as error:
            return replace(self, problems={"settings": str(error)})
        try:
            shape = read_shape(str(settings.model_folder))
            plan = make_plan(
                settings, shape, self.hardware, nodes=self.placement.nodes, ranks_per_node=ranks
            )
        except UserError as error:
            return replace(self, settings=settings, problems={"plan": str(error)})
        return replace(self, settings=settings, plan=plan)

    @property
    def known_settings(self) -> RunSettings:
        """The settings. Raises UserError with the reason where there are none."""
        if self.settings is None:
            raise UserError(self.problems["settings"])
        return self.settings

    @property
    def known_plan(self) -> Plan:
        """The plan. Raises UserError with the reason where there is none."""
        if self.plan is None:
            raise UserError(self.problems["plan"])
        return self.plan

    @property
    def model_folder(self) -> Path:
        """The base's folder."""
        return self.known_settings.model_folder

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.known_settings.output_dir)

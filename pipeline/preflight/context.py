"""What preflight looks at: one rank's view of the run that is to be started."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    """A run, its rank and its machine. Without settings or a plan `problems` says why.

    `beat` is told where this rank is, so that one which does not come along can be named.
    `missing_gpus`: what was granted where the driver shows none. One process trains on its first
    GPU, and looks at all of them where `is_training` is not said.
    """

    placement: Placement
    hardware: Hardware
    session: Session
    settings: RunSettings | None
    plan: Plan | None
    problems: dict[str, str] = field(default_factory=dict)
    beat: Callable[[str], None] = lambda where: None
    missing_gpus: str | None = None
    is_training: bool = False

    @classmethod
    def read(
        cls,
        run_file: Path,
        overrides: Sequence[str],
        *,
        placement: Placement,
        hardware: Hardware,
        session: Session,
        beat: Callable[[str], None],
        missing_gpus: str | None = None,
    ) -> Self:
        """The run of a run file.

        What is wrong with it becomes a problem, not an error: other ranks may see another file,
        and wait.
        Without a launcher the plan is for every device of the machine, as `deepspeed` would start
        it.
        """
        problems: dict[str, str] = {}
        settings, plan = None, None
        is_alone = placement.world_size == 1
        ranks = hardware.devices_per_node if is_alone else placement.local_size
        try:
            settings = load_settings(run_file, overrides)
        except UserError as error:
            problems["settings"] = str(error)
        if settings is not None:
            try:
                shape = read_shape(str(settings.model_folder))
                plan = make_plan(
                    settings, shape, hardware, nodes=placement.nodes, ranks_per_node=ranks
                )
            except UserError as error:
                problems["plan"] = str(error)
        return cls(
            placement=placement,
            hardware=hardware,
            session=session,
            settings=settings,
            plan=plan,
            problems=problems,
            beat=beat,
            missing_gpus=missing_gpus,
        )

    @property
    def known_settings(self) -> RunSettings:
        """The settings. Raises UserError with what is wrong with them."""
        if self.settings is None:
            raise UserError(self.problems["settings"])
        return self.settings

    @property
    def known_plan(self) -> Plan:
        """The plan. Raises UserError with why there is none."""
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

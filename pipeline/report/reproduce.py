"""The versions of a run and the commands that repeat it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.commands import command, script
from pipeline.report.folder import RunRecords, dict_or_empty


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """How to repeat a run.

    `versions`: package -> version. `inputs`: pairs of name and value, such as model and seed.
    `commands`: pairs of purpose and command line.
    """

    versions: Mapping[str, str]
    inputs: list[tuple[str, str]]
    commands: list[tuple[str, str]]


def reproduction_of(run: RunRecords) -> Reproduction:
    """The package versions and inputs of a run, and the commands that repeat it."""
    versions = {name: str(value) for name, value in run.versions.items()}
    if "rankzero" not in versions and "version" in run.plan:
        versions = {"rankzero": str(run.plan["version"]), **versions}
    return Reproduction(versions=versions, inputs=_inputs(run), commands=_commands(run, versions))


def _inputs(run: RunRecords) -> list[tuple[str, str]]:
    """Model, revision and hash of the base, and the seed."""
    settings = run.settings
    candidates = [
        ("model", settings.get("model")),
        ("model revision", settings.get("model_revision")),
        ("SHA-256 of the base", run.base.get("sha256")),
        ("SHA-256 of the adapter", run.score.get("adapter_sha256")),
        ("seed", settings.get("seed")),
    ]
    return [(name, str(value)) for name, value in candidates if value is not None]


def _commands(run: RunRecords, versions: Mapping[str, str]) -> list[tuple[str, str]]:
    folder = shlex.quote(str(run.folder))
    # A local part such as +cpu names a build, which pip finds only in the index of that build.
    pins = [
        f"{name}=={version.partition('+')[0]}"
        for name, version in versions.items()
        if name != "rankzero"
    ]
    commands = []
    if pins:
        commands.append(("install the same versions", shlex.join(["pip", "install", *pins])))
    if run.settings:
        arguments = shlex.join([f"{run.folder}/run.yaml", f"output_dir={run.folder}-again"])
        commands.append(("train again, into another folder", f"{_launcher(run)} {arguments}"))
        commands.append(("merge", f"{command('merge')} {folder}"))
        if run.settings.get("eval_data"):
            commands.append(("score", f"{command('score')} {folder}"))
    return commands


def _launcher(run: RunRecords) -> str:
    """The start command without the run file, for the ranks of the plan."""
    hardware = dict_or_empty(run.plan.get("hardware"))
    nodes = hardware.get("nodes", 1)
    ranks = hardware.get("ranks_per_node", hardware.get("ranks", 1))
    if nodes == 1 and ranks == 1:
        return command("train")
    ranks_option = "--num_accelerators" if hardware.get("kind") == "cpu" else "--num_gpus"
    hosts = f"--hostfile HOSTS --num_nodes {nodes} " if nodes != 1 else ""
    return f"deepspeed {hosts}{ranks_option} {ranks} {script('train')}"

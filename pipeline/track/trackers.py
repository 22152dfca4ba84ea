"""Tracker: the interface of experiment trackers, with a subclass for each supported tracker.

A subclass uses the library of its tracker, which is imported when the tracker is created.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.track.facts import RunFacts

Metrics = Mapping[str, float]
Table = Sequence[Mapping[str, str]]
# Metric that W&B's charts use as x axis. W&B's own step counter cannot be used: it drops points
# with a step below the last one, and a resumed run sends such points.
STEP_METRIC = "train/step"
_MLFLOW_BATCH = 100  # parameters; MLflow refuses more in one call
_MLFLOW_MAX_LENGTH = 6000  # characters of a parameter's value; MLflow refuses more


class Tracker(ABC):
    """A run in one tracker."""

    @abstractmethod
    def __init__(self, facts: RunFacts, run_id: str | None) -> None:
        """Create the run, or continue the one with the id that an earlier start got."""

    @property
    @abstractmethod
    def run_id(self) -> str:
        """The id with which a later start continues this run."""

    @abstractmethod
    def log(self, metrics: Metrics, step: int) -> None:
        """Send the metrics of one step."""

    @abstractmethod
    def table(self, name: str, rows: Table) -> None:
        """Send a table, whose rows have equal keys."""

    @abstractmethod
    def artifact(self, name: str, folder: Path) -> None:
        """Send the files of a folder."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all data is sent, and close the run."""


class Wandb(Tracker):
    """Weights & Biases, online or with WANDB_MODE=offline."""

    def __init__(self, facts: RunFacts, run_id: str | None) -> None:
        import wandb

        self._wandb = wandb
        facts.local_folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=facts.project,
            name=facts.name,
            group=facts.group,
            id=run_id,
            resume="allow" if run_id else None,
            config=dict(facts.config),
            dir=str(facts.local_folder),
            # Nothing about this machine, its user, code, packages and command line is sent.
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, disable_code=True, disable_git=True,
                disable_job_creation=True, x_disable_meta=True, x_disable_stats=True,
                x_disable_machine_info=True, x_save_requirements=False, program="rankzero",
                program_relpath="rankzero", program_abspath="rankzero", host="-", username="-",
                email="-", x_executable="-",
            ),
        )  # fmt: skip
        self._run.define_metric(STEP_METRIC)
        self._run.define_metric("*", step_metric=STEP_METRIC)

    @property
    def run_id(self) -> str:
        return str(self._run.id)

    def log(self, metrics: Metrics, step: int) -> None:
        self._run.log({**metrics, STEP_METRIC: step})

    def table(self, name: str, rows: Table) -> None:
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self._run.log({name: self._wandb.Table(columns=columns, data=data)})

    def artifact(self, name: str, folder: Path) -> None:
        artifact = self._wandb.Artifact(f"{name}-{self._run.id}", type="model")
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        self._run.finish()


class TensorBoard(Tracker):
    """TensorBoard's event files in RUN_FOLDER/tracking/tensorboard."""

    def __init__(self, facts: RunFacts, run_id: str | None) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = facts.local_folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._writer: Any = EventFileWriter(str(folder))
        if run_id is None:
            rows = [{"setting": name, "value": str(value)} for name, value in facts.config.items()]
            self.table("settings", rows)

    @property
    def run_id(self) -> str:
        return "tensorboard"

    def log(self, metrics: Metrics, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(Summary(value=values), step)

    def table(self, name: str, rows: Table) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        columns = list(rows[0])
        lines = [columns, ["---"] * len(columns)]  # of a Markdown table
        lines += [[row[column].replace("|", "\\|") for column in columns] for row in rows]
        self._add(text_pb(name, "\n".join(f"| {' | '.join(cells)} |" for cells in lines)), 0)

    def _add(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(summary=summary, step=step, wall_time=time.time()))

    def artifact(self, name: str, folder: Path) -> None:
        """Does nothing: event files cannot contain files, and the folder is on the same machine."""

    def finish(self) -> None:
        self._writer.close()


class Mlflow(Tracker):
    """MLflow at MLFLOW_TRACKING_URI, else a SQLite file in RUN_FOLDER/tracking."""

    def __init__(self, facts: RunFacts, run_id: str | None) -> None:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.tracking import MlflowClient

        facts.local_folder.mkdir(parents=True, exist_ok=True)
        local_folder = facts.local_folder.resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{local_folder / 'mlflow.db'}"
        self._client, self._metric = MlflowClient(uri), Metric
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._id = run_id
            return
        experiment = self._client.get_experiment_by_name(facts.project)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            is_server = uri.startswith("http")  # which stores artifacts itself
            artifacts_uri = None if is_server else (local_folder / "mlflow-artifacts").as_uri()
            experiment_id = self._client.create_experiment(facts.project, artifacts_uri)
        tags = [RunTag("group", facts.group)] if facts.group else []
        run = self._client.create_run(experiment_id, run_name=facts.name)
        self._id = run.info.run_id
        params = [
            Param(name, str(value)[:_MLFLOW_MAX_LENGTH]) for name, value in facts.config.items()
        ]
        self._client.log_batch(self._id, tags=tags)
        for start in range(0, len(params), _MLFLOW_BATCH):
            self._client.log_batch(self._id, params=params[start : start + _MLFLOW_BATCH])

    @property
    def run_id(self) -> str:
        return str(self._id)

    def log(self, metrics: Metrics, step: int) -> None:
        now_ms = int(time.time() * 1000)
        values = [self._metric(name, value, now_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=values)

    def table(self, name: str, rows: Table) -> None:
        data = {column: [row[column] for row in rows] for column in rows[0]}
        self._client.log_table(self._id, data, f"{name}.json")

    def artifact(self, name: str, folder: Path) -> None:
        self._client.log_artifacts(self._id, str(folder), name)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


class Trackio(Tracker):
    """Trackio's database: local (TRACKIO_DIR, else RUN_FOLDER/tracking/trackio) or a hub Space."""

    def __init__(self, facts: RunFacts, run_id: str | None) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(facts.local_folder / "trackio"))
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            facts.project,
            name=facts.name,
            group=facts.group,
            config=dict(facts.config),
            resume="allow" if run_id else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    @property
    def run_id(self) -> str:
        return str(self._run.name)

    def log(self, metrics: Metrics, step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def table(self, name: str, rows: Table) -> None:
        import pandas

        self._run.log({name: self._trackio.Table(dataframe=pandas.DataFrame(list(rows)))})

    def artifact(self, name: str, folder: Path) -> None:
        self._trackio.log_artifact(str(folder), name=name, type="model")

    def finish(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, type[Tracker]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
    "trackio": Trackio,
}

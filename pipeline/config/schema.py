"""The JSON schema of a run file, for completion and checks in editors."""

from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.config.traits import traits

_DIALECT = "https://json-schema.org/draft/2020-12/schema"  # pydantic generates this one


def run_file_schema() -> dict[str, Any]:
    """The JSON schema of a run file: type, bounds, default and description of every setting.

    It covers each setting by itself; combinations of settings are checked when the file is loaded.
    """
    schema = RunSettings.model_json_schema()
    internal = {"title", *traits()}
    for described in schema["properties"].values():
        for name in internal & described.keys():
            del described[name]
    title = {"$schema": _DIALECT, "title": "RankZero run file"}
    return title | {
        key: value for key, value in schema.items() if key not in ("title", "description")
    }

"""The JSON schema of a run file, for completion and checks in editors."""

from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.config.traits import traits

_DIALECT = "https://json-schema.org/draft/2020-12/schema"  # pydantic generates this one


def run_file_schema() -> dict[str, Any]:
    """The JSON schema of a run file: type, bounds, default and description of every setting.

    It covers each setting separately; combinations of settings are checked when the file is loaded.
    """
    schema = RunSettings.model_json_schema()
    # pydantic copies the traits of a setting (traits.py), which are not part of a JSON schema.
    removed_keys = {"title", *traits()}
    for setting_schema in schema["properties"].values():
        for key in removed_keys & setting_schema.keys():
            del setting_schema[key]
    header = {"$schema": _DIALECT, "title": "RankZero run file"}
    return header | {
        key: value for key, value in schema.items() if key not in ("title", "description")
    }

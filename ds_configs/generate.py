"""Write the golden DeepSpeed configs from cases.yaml; `--check` only compares."""

import sys
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.settings import RunSettings
from pipeline.files import dump_json
from pipeline.plan.given.catalogue import cpu_of, gpu_like
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import Plan, make_plan

HERE = Path(__file__).parent


def plan_of(case: dict[str, Any]) -> Plan:
    """The plan for a case of cases.yaml."""
    model = str(HERE / "models" / case["model"])
    run = {"model": model, "train_data": "train.jsonl", "output_dir": "run"}
    settings = RunSettings.model_validate(run | case["settings"])
    hardware = gpu_like(case["gib"]) if "gib" in case else cpu_of(16, 64 * 2**30)
    ranks = case.get("gpus", 1)
    return make_plan(
        settings, read_shape(model), hardware, nodes=case.get("nodes", 1), ranks_per_node=ranks
    )


def goldens() -> dict[str, str]:
    """Text of each golden file, by its name."""
    cases = yaml.safe_load((HERE / "cases.yaml").read_text(encoding="utf-8"))
    return {f"{name}.json": dump_json(plan_of(case).deepspeed) for name, case in cases.items()}


def main() -> None:
    expected = goldens()
    existing = {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("*.json")}
    names = expected | existing
    stale = sorted(name for name in names if expected.get(name) != existing.get(name))
    if "--check" in sys.argv:
        if stale:
            sys.exit(f"ds_configs/: {', '.join(stale)}: outdated; run `make goldens`")
        return
    for name in stale:
        if name in expected:
            (HERE / name).write_text(expected[name], encoding="utf-8")
        else:
            (HERE / name).unlink()


if __name__ == "__main__":
    main()

"""`make quickstart`: download the model, generate the data, then run the documented commands.

Commands whose output is newer than their input are skipped, so a second start repeats nothing.
"""

import os
import sys
import time
import webbrowser
from pathlib import Path

try:
    import gguf  # noqa: F401 - transformers reads the downloaded model with it
    from commands import fp32_option, launcher_command, run_if_outdated
    from download_model import download_model
    from make_data import make_data
    from summary import print_summary

    from pipeline.cluster.devices import detect_hardware
    from pipeline.cluster.exits import run_main
    from pipeline.cluster.progress import duration
except ModuleNotFoundError as error:
    sys.path.append(str(Path(__file__).parents[1]))
    from not_installed import exit_with_advice

    exit_with_advice(error)

FOLDER, RUN_FILE = Path("quickstart"), "launch/runs/quickstart.yaml"
RUN_FOLDER = FOLDER / "run"


def main() -> None:
    hardware = detect_hardware()
    if hardware.kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed warns that there is no GPU
    download_model(FOLDER / "smollm2-135m-instruct")
    start = time.monotonic()
    make_data(FOLDER)
    deepspeed = launcher_command(hardware)
    train = f"{deepspeed} launch/train.py {RUN_FILE}{fp32_option(hardware)}"
    # Each output shows by its time that its command has ended.
    adapter, merged = RUN_FOLDER / "adapter/README.md", RUN_FOLDER / "merged/config.json"
    scores, report = RUN_FOLDER / "score.json", RUN_FOLDER / "report.html"
    has_run = [
        run_if_outdated(train, FOLDER / "train.jsonl", adapter),
        run_if_outdated(f"python launch/merge.py {RUN_FOLDER}", adapter, merged),
        run_if_outdated(f"{deepspeed} launch/score.py {RUN_FOLDER}", merged, scores),
        run_if_outdated(f"python launch/report.py {RUN_FOLDER}", scores, report),
    ]
    print_summary(RUN_FOLDER, RUN_FILE)
    if any(has_run):
        print(f"Time without the download: {duration(time.monotonic() - start)}")
    else:
        print(f"Nothing was left to do. To start over, remove {RUN_FOLDER}.")
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(report.resolve().as_uri())


if __name__ == "__main__":
    run_main(main)

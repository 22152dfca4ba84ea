"""Measure one case of tests/gpu/test_memory.py; torchrun starts it once for each rank:

    torchrun --standalone -m tests.gpu.memory_case FOLDER CASE RESULTS

Creates the model folder of the case if it is missing, trains two steps, and writes the measured and
the predicted peak to RESULTS/RANK.json. Without CUDA it counts the bytes of live tensors instead.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch

from pipeline.cluster.devices import detect_hardware
from pipeline.cluster.placement import from_environment
from pipeline.cluster.session import Session
from pipeline.model.base import load_base
from pipeline.train.live_bytes import LiveBytes
from tests.bench.memory import Case, make_folder, plan_case, two_steps


def make_missing_folder(folder, model, device):
    if not folder.exists():
        make_folder(folder, model, device)
        gc.collect()
        torch.cuda.empty_cache()


def peak_of_two_steps(session, plan, documents):
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        two_steps(session, plan, load_base(plan, session.device), documents)
        return torch.cuda.max_memory_allocated()
    with LiveBytes() as live:
        two_steps(session, plan, load_base(plan, session.device), documents)
    return live.peak


def main():
    folder, case = Path(sys.argv[1]), Case(**json.loads(sys.argv[2]))
    hardware = detect_hardware()
    with Session(from_environment(os.environ), hardware) as session:
        session.start()
        session.rank_zero_first(lambda: make_missing_folder(folder, case.model, session.device))
        plan = plan_case(folder, case, hardware)
        peak = peak_of_two_steps(session, plan, case.documents)
    result = {
        "measured": peak,
        "predicted": plan.memory.tensor_bytes,
        "moment": plan.memory.worst_moment,
    }
    # A file for each rank: lines that two ranks print into one pipe may be mixed.
    Path(sys.argv[3], f"{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

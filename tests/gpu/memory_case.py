"""One rank of one case of tests/gpu/test_memory.py, in a process of its own:

    torchrun --standalone -m tests.gpu.memory_case FOLDER CASE FOUND

Makes the model of the case in the folder, if it is not there, and writes the peak of a run of two
steps beside the plan's to FOUND/RANK.json. On a machine without CUDA live tensors are counted
instead.
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


def make_once(folder, model, device):
    if not folder.exists():
        make_folder(folder, model, device)
        gc.collect()
        torch.cuda.empty_cache()


def peak_of(session, plan, documents):
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
        session.rank_zero_first(lambda: make_once(folder, case.model, session.device))
        plan = plan_case(folder, case, hardware)
        peak = peak_of(session, plan, case.documents)
    found = {
        "measured": peak,
        "predicted": plan.memory.tensor_bytes,
        "moment": plan.memory.worst_moment,
    }
    # A file for each rank: what two ranks print into one pipe may share a line.
    Path(sys.argv[3], f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

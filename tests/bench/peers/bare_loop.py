"""A training loop without a trainer: peft, DistributedDataParallel and AdamW.

The adapter is in bf16, as DeepSpeed has it, and AdamW updates a copy of it in fp32.
"""

import json
import random
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from model_and_rows import load_model, tokenised_rows
from recorder import Recorder
from torch.nn.parallel import DistributedDataParallel


def batch_of(rows, pad_id):
    """A batch of these rows, padded at the end to the longest one."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(key, value):
        return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": padded("input_ids", pad_id),
        "labels": padded("labels", -100),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
    }


def main():
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(case["seed"])
    model = load_model(case, autocast_adapter_dtype=False)
    if case["gradient_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokenizer, rows = tokenised_rows(case)
    random.Random(case["seed"]).shuffle(rows)
    rows = rows[rank::world]
    recorder = Recorder(case["folder"])
    recorder.watch(model)
    parallel = DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float().requires_grad_() for p in trained]
    optimizer = torch.optim.AdamW(masters, lr=case["lr"])
    batch_size, accumulation_steps = case["batch_size"], case["accumulation_steps"]
    model.train()
    for _ in range(case["max_steps"]):
        for index in range(accumulation_steps):
            batch = batch_of(rows[:batch_size], tokenizer.pad_token_id)
            rows = rows[batch_size:]
            is_last = index + 1 == accumulation_steps
            with nullcontext() if is_last else parallel.no_sync():
                (parallel(**batch).loss / accumulation_steps).backward()
        for master, parameter in zip(masters, trained, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, trained, strict=True):
                parameter.copy_(master)
        recorder.end_step()
    if rank == 0:
        model.save_pretrained(f"{case['folder']}/adapter")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

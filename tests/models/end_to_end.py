"""End-to-end check of one model class: class checks, training on 2 ranks, plain peft, merge.

matrix.py calls `check_class` and `verify` in forks of an interpreter that has imported torch and
the other slow modules (tests/ranks.py); `train` starts its two ranks in such forks.
"""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig

from pipeline.cluster.placement import Placement
from pipeline.config.settings import RunSettings
from pipeline.data.dataset.reader import DataIndex, open_split
from pipeline.errors import UserError
from pipeline.model.base import load_plain
from pipeline.model.checkpoint_names import model_on_meta, stored_names
from pipeline.model.proof import prove
from pipeline.model.quantised_files import is_dequantised
from pipeline.plan.given.catalogue import cpu_of
from pipeline.plan.given.class_proof import adapted_names
from pipeline.plan.given.families import FAMILIES
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import make_plan
from pipeline.train.run import run_training
from tests.adapter.merged import merge_adapter, tensors
from tests.model.kinds import QUANTISED_CHECKPOINTS
from tests.model.models import build, cache_shape
from tests.model.quantised_checkpoints import make_quantised_checkpoint
from tests.ranks import run_processes
from tests.tiny import make_tokenizer

STEPS = 4
MODES = {
    "zero2": {"zero_stage": 2, "gradient_checkpointing": False},
    "zero3": {"zero_stage": 3, "gradient_checkpointing": True},
    "experts": {
        "zero_stage": 3,
        "gradient_checkpointing": True,
        "lora_target_modules": ["auto", "experts"],
    },
    "qlora": {"zero_stage": 2, "gradient_checkpointing": False, "load_in_4bit": True},
}
ROWS = [
    {"messages": [{"role": "user", "content": f"{i} " + "ask " * (i % 4)},
                  {"role": "assistant", "content": "yes " * (1 + i % 3) + str(i)}]}
    for i in range(20)
]  # fmt: skip


def make_folder(kind, kinds, folder):
    """Save random weights of a kind, a tokenizer, and rows for training and evaluation.

    `kinds`: for each kind its model_type and keys of its config (tests/model/kinds.py).
    """
    if kind in QUANTISED_CHECKPOINTS:
        make_quantised_checkpoint(kind, folder)
    else:
        build(kind, kinds=kinds).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for name, rows in (("train", ROWS), ("eval", ROWS[:7])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def run_settings(folder, mode, changes=()):
    """Settings of a run in one of MODES."""
    values = {
        "model": str(folder),
        "train_data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "eval.jsonl"),
        "output_dir": str(folder.parent / mode),
        "max_steps": STEPS,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "lr": 4e-3,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "fp16": False,
        "batch_size": 2,
        "global_batch_size": 4,
        "max_length": 64,
        "evaluation_strategy": "steps",
        "eval_steps": STEPS,
        "save_strategy": "no",
    }
    return RunSettings.model_validate(values | MODES[mode] | dict(changes))


def check_class(kind, kinds, folder):
    """Write the model folder, compute its shape, and run the class checks of the plan on it.

    Returns the results of the checks. If the model is refused, "refused" has the reason; without a
    plan it is the only key.
    """
    make_folder(kind, kinds, folder)
    settings = run_settings(folder, "zero2")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        if config["model_type"] not in FAMILIES:
            cache_shape(folder)
        shape = read_shape(str(folder))
        names = adapted_names(shape, settings)
        proof = prove(folder, names)
        plan = make_plan(settings, shape, cpu_of(2, 2**34), nodes=1, ranks_per_node=2)
    except UserError as error:
        reason = str(error).replace(str(folder), "MODEL")
        return {"refused": reason.removeprefix("model: MODEL/config.json: ")}
    return {
        "class": re.sub(r"^\d+_", "", config["architectures"][0]),
        "errors": dict(proof.errors),
        "without_packs": list(proof.without_packs),
        "without_reentrant": list(proof.without_reentrant),
        "without_merge": list(proof.without_merge),
        "trainable": plan.trainable,
        "has_experts": bool(shape.num_experts),
        **({"refused": proof.refusals[0]} if proof.refusals else {}),
    }


def train(folder, mode, changes=()):
    """Train on two ranks, like `deepspeed launch/train.py`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [(rank, port, str(folder), mode, changes) for rank in range(2)]
    run_processes(_train_on_rank, ranks, 240)


def _train_on_rank(rank, port, folder, mode, changes):
    placement = Placement(rank=rank, local_rank=rank, world_size=2, local_size=2, master_port=port)
    variables = placement.variables()
    del (
        variables["CROSS_RANK"],
        variables["CROSS_SIZE"],
    )  # else a rank looks for its launcher, and stops
    os.environ.update(variables)
    run_training(run_settings(Path(folder), mode, changes))


def verify(folder, mode):
    """Compare a run with plain peft: the held-out loss of its adapter, and its merged weights."""
    run = folder.parent / mode
    ours = _last_eval_loss(run)
    options = {"dtype": torch.float32, "attention": "eager"} | _quantisation(mode, folder)
    model = load_plain(folder, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else its products are rounded to bf16
    loss_of_base = _held_out_loss(model, run)
    model = PeftModel.from_pretrained(model, run / "adapter").eval()
    theirs = _held_out_loss(model, run)
    result = {
        "loss": ours,
        "loss_error": abs(ours - theirs) / abs(theirs),
        "loss_of_base": loss_of_base,
        "zero_matrices": sum(
            not bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n
        ),
    }
    if mode != "qlora":
        result["merged"] = _merge_error(folder, run, model)
    return result


def _quantisation(mode, folder):
    if mode != "qlora":
        return {}
    shape = read_shape(str(folder))
    outside = rf"(?!{re.escape(shape.layers_name)}\.).*"
    not_quantised = [name for name, x in shape.linears.items() if not x.is_quantised]
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=[outside, *not_quantised],
        )
    }


def _last_eval_loss(run):
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["eval_loss"] for line in lines if "eval_loss" in line][-1]


@torch.no_grad()
def _held_out_loss(model, run):
    """Mean loss over the supervised tokens of the held-out documents, one per forward pass."""
    split = open_split(DataIndex.load(run / "data").eval)
    total, count = 0.0, 0
    for number in range(len(split)):
        ids, supervised = split.document(number)
        ids = torch.tensor(ids, dtype=torch.long)[None]
        labels = ids.masked_fill(~torch.tensor(supervised)[None], -100)
        tokens = int((labels[:, 1:] != -100).sum())
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        total, count = total + float(loss) * tokens, count + tokens
    return total / count


def _merge_error(folder, run, model):
    """Largest relative difference of our merged weights to peft's, or why there was no merge."""
    try:
        # as peft's model here, which is loaded in fp32
        dtype = "F32" if is_dequantised(folder) else None
        merge_adapter(folder, run / "adapter", run / "merged", dtype=dtype)
    except UserError as error:
        return str(error).replace(str(folder.parent), "")
    model.merge_and_unload().save_pretrained(run / "theirs")
    ours, theirs = tensors(run / "merged"), tensors(run / "theirs")
    # peft's names differ from ours if a text model is loaded from a multimodal checkpoint.
    stored = stored_names(model_on_meta(folder), ours)
    names = {name: x.keys[0] for name, x in stored.items() if x.converter is None}
    if unknown := {names.get(key, key) for key in theirs} - ours.keys():
        return f"names differ: {sorted(unknown)[:4]}"
    ours = {key: ours[names.get(key, key)] for key in theirs}
    worst = max(
        float((ours[key] - theirs[key]).norm() / theirs[key].norm().clamp_min(1e-30))
        for key in theirs
    )
    shutil.rmtree(run / "theirs")
    return worst

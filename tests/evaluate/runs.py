"""A run folder with a random adapter, for the tests of evaluation."""

from pathlib import Path

import yaml

from tests.tiny import make_model, make_rows

SETTINGS = {
    "lora_r": 4, "lora_dropout": 0.0, "global_batch_size": 4, "batch_size": 1, "max_length": 128,
    "bf16": False, "fp16": False, "packing": False,
}  # fmt: skip


def make_run(folder: Path, *, rows: int = 10, **settings) -> Path:
    """Write FOLDER/base, train.jsonl, heldout.jsonl and run; return the run folder FOLDER/run.

    `rows`: number of held-out rows. `settings`: added to run.yaml. The adapter is random in A and
    B, so that the outputs with it differ from those of the base.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from pipeline.config.load import load_settings
    from pipeline.data.prepare.prepare import prepare_data

    base, run = make_model(folder / "base"), folder / "run"
    run.mkdir()
    values = {
        "model": str(base),
        "train_data": str(make_rows(folder / "train.jsonl", 8)),
        "eval_data": str(make_rows(folder / "heldout.jsonl", rows)),
        "output_dir": str(run),
    }
    (run / "run.yaml").write_text(yaml.safe_dump(values | SETTINGS | settings))
    prepare_data(load_settings(run / "run.yaml"), run / "data", processes=1)
    torch.manual_seed(1)
    # init_lora_weights=False: B is random instead of zero.
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(run / "adapter")
    return run

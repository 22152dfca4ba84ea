"""SFTTrainer of TRL."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from model_and_rows import lora_config, quantisation
from recorder import StepCallback
from trainer_arguments import trainer_arguments
from trl import SFTConfig, SFTTrainer


def main():
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    order = "group_by_length" if case["sorted"] else "random"
    model_options = {"dtype": torch.bfloat16}
    if case["load_in_4bit"]:
        model_options["quantization_config"] = quantisation(case)
    arguments = SFTConfig(
        **trainer_arguments(case), train_sampling_strategy=order, packing=case["packing"],
        max_length=case["max_length"], model_init_kwargs=model_options,
    )  # fmt: skip
    lines = Path(case["rows"]).read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line)["messages"] for line in lines]
    rows = [{"prompt": messages[:1], "completion": messages[1:]} for messages in conversations]
    trainer = SFTTrainer(
        model=case["model"],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        peft_config=lora_config(case),
        callbacks=[StepCallback(case["folder"])],
    )
    trainer.train()
    trainer.save_model(f"{case['folder']}/adapter")


if __name__ == "__main__":
    main()

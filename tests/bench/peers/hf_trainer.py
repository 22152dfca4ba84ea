"""Trainer of transformers with an adapter of peft."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from model_and_rows import load_model, tokenised_rows
from recorder import StepCallback
from trainer_arguments import trainer_arguments
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments


def main():
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    order = "group_by_length" if case["sorted"] else "random"
    # Before the model is loaded: at ZeRO-3 it is sharded while it is loaded.
    arguments = TrainingArguments(**trainer_arguments(case), train_sampling_strategy=order)
    tokenizer, rows = tokenised_rows(case)
    trainer = Trainer(
        model=load_model(case),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[StepCallback(case["folder"])],
    )
    trainer.train()
    trainer.save_model(f"{case['folder']}/adapter")


if __name__ == "__main__":
    main()

"""`llamafactory-cli train` with a callback that records the steps."""

import json
import sys
from pathlib import Path
from types import ModuleType

from recorder import StepCallback  # imports transformers, which looks for torchaudio
from trainer_arguments import trainer_arguments

# LLaMA-Factory imports it for audio files; the wheel does not load with a CPU build of torch.
sys.modules["torchaudio"] = ModuleType("torchaudio")
from llamafactory.train.tuner import run_exp  # noqa: E402


def main():
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    data = Path(case["folder"]) / "data"
    data.mkdir(exist_ok=True)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    info = {
        "file_name": case["rows"], "formatting": "sharegpt", "columns": {"messages": "messages"},
        "tags": tags | {"assistant_tag": "assistant"},
    }  # fmt: skip
    (data / "dataset_info.json").write_text(json.dumps({"rows": info}), encoding="utf-8")
    arguments = trainer_arguments(case)
    # LLaMA-Factory has switches of its own for checkpointing and the order of rows.
    arguments["disable_gradient_checkpointing"] = not arguments.pop("gradient_checkpointing")
    order = "group_by_length" if case["sorted"] else "random"
    arguments |= {
        "model_name_or_path": case["model"], "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "lora_rank": case["lora_r"], "lora_alpha": case["lora_alpha"],
        "lora_dropout": case["lora_dropout"], "lora_target": ",".join(case["targets"]),
        "dataset": "rows", "dataset_dir": str(data), "template": "smollm2",
        "cutoff_len": case["max_length"], "packing": case["packing"],
        "neat_packing": case["packing"], "train_sampling_strategy": order,
        "preprocessing_num_workers": 1, "overwrite_cache": True,
    }  # fmt: skip
    if case["load_in_4bit"]:
        arguments |= {
            "quantization_bit": 4,
            "quantization_type": "nf4",
            "double_quantization": True,
        }
    run_exp(arguments, callbacks=[StepCallback(case["folder"])])


if __name__ == "__main__":
    main()

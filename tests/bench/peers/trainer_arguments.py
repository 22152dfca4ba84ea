"""Arguments of a Trainer of transformers for a case; TRL and LLaMA-Factory take the same."""

import math

# The defaults of RankZero.
_WEIGHT_DECAY, _WARMUP_SHARE = 0.01, 0.03


def trainer_arguments(case):
    deepspeed_config = {
        "zero_optimization": {"stage": case["zero_stage"]},
        "bf16": {"enabled": True},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
    }
    return {
        "output_dir": f"{case['folder']}/output", "use_cpu": True, "bf16": True,
        "deepspeed": deepspeed_config, "ddp_backend": "gloo", "max_steps": case["max_steps"],
        "per_device_train_batch_size": case["batch_size"],
        "gradient_accumulation_steps": case["accumulation_steps"],
        "gradient_checkpointing": case["gradient_checkpointing"], "learning_rate": case["lr"],
        "lr_scheduler_type": "cosine", "weight_decay": _WEIGHT_DECAY,
        "warmup_steps": math.ceil(_WARMUP_SHARE * case["max_steps"]),
        "optim": "adamw_torch", "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "seed": case["seed"],
        "dataloader_pin_memory": False, "disable_tqdm": True,
    }  # fmt: skip

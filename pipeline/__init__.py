"""RankZero: LoRA and QLoRA fine-tuning on DeepSpeed, from run file to merged model."""

__version__ = "0.2.0.dev0"

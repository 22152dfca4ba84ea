"""Run benchmarks with lm-evaluation-harness (package lm_eval), as a separate process."""

import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import RankZeroError, UserError
from pipeline.evaluate.model_specs import ModelSpec
from pipeline.model.quantised_files import is_dequantised

logger = logging.getLogger(__name__)


def run_harness(specs: Sequence[ModelSpec], tasks: str, out: Path) -> None:
    """Run tasks of lm-evaluation-harness for each model.

    `specs`: the models. `tasks`: names or YAML files, separated by commas. `out`: path of the score
    file, such as RUN_FOLDER/score.json; the results are then in RUN_FOLDER/score-tasks. Raises
    UserError if the package is missing.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            "--tasks: lm-evaluation-harness is not installed; pip install 'lm_eval[hf]'"
        )
    for spec in specs:
        if is_dequantised(spec.folder):  # the folder has quantised weights
            logger.warning(
                "--tasks: %s: lm_eval loads the base with its mxfp4 or fp8 weights, but "
                "training dequantised them, so the results may differ from those of other models",
                spec.name,
            )
        folder_name = spec.name.replace("/", "_").replace(" ", "-")
        folder = out.with_name(f"{out.stem}-tasks") / folder_name
        command = harness_command(spec, tasks, folder)
        logger.info("%s: %s", spec.name, shlex.join(["python", *command[1:]]))
        if code := subprocess.run(command, check=False).returncode:
            raise RankZeroError(f"--tasks: lm_eval ended with exit code {code} for {spec.name}")
        logger.info("%s: results in %s", spec.name, folder)


def _tokenizer_folder(spec: ModelSpec) -> Path:
    """The folder of the model's tokenizer.

    The base's tokenizer lacks the tokens of the setting `new_tokens`; those of the adapter and of
    the merged model have them.
    """
    if not spec.settings.new_tokens:
        return spec.settings.model_folder
    if spec.is_adapter_used and spec.adapter is not None:
        return spec.adapter
    return spec.folder


def harness_command(spec: ModelSpec, tasks: str, folder: Path) -> list[str]:
    """The command line for one model, which writes its results to `folder`.

    If training quantised the base, lm_eval is told to quantise it in the same way.
    """
    settings = spec.settings
    arguments: dict[str, Any] = {
        "pretrained": spec.folder,
        "tokenizer": _tokenizer_folder(spec),
        "dtype": "auto",
    }
    if spec.adapter is not None and spec.is_adapter_used:
        arguments["peft"] = spec.adapter
    if settings.trust_remote_code:
        arguments["trust_remote_code"] = "True"
    if settings.is_quantised and not spec.is_merged:
        arguments["load_in_4bit" if settings.load_in_4bit else "load_in_8bit"] = "True"
        if settings.load_in_4bit:
            compute_dtype: str = settings.bnb_4bit_compute_dtype
            if compute_dtype == "auto":  # the training dtype
                from pipeline.evaluate.loading import single_process_plan  # imports torch

                compute_dtype = single_process_plan(settings).training_dtype
            arguments["bnb_4bit_quant_type"] = settings.bnb_4bit_quant_type
            arguments["bnb_4bit_use_double_quant"] = settings.bnb_4bit_use_double_quant
            arguments["bnb_4bit_compute_dtype"] = compute_dtype
    model_args = ",".join(f"{key}={value}" for key, value in arguments.items())
    return [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model_args,
        "--tasks", tasks, "--output_path", str(folder),
    ]  # fmt: skip

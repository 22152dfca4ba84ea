"""Benchmarks of lm-evaluation-harness (package lm_eval), which runs as a separate command."""

import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import RankZeroError, UserError
from pipeline.evaluate.subjects import Subject
from pipeline.model.packed_files import is_packed

logger = logging.getLogger(__name__)


def run_harness(subjects: Sequence[Subject], tasks: str, out: Path) -> None:
    """Run tasks of lm-evaluation-harness for each model.

    `tasks`: names or YAML files, separated by commas. `out`: path of the score file, such as
    RUN/score.json; the results are then in RUN/score-tasks. Raises UserError if the package is
    missing.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            "--tasks: lm-evaluation-harness is not installed; pip install 'lm_eval[hf]'"
        )
    for subject in subjects:
        if is_packed(subject.folder):
            logger.warning(
                "--tasks: %s: lm_eval loads the base with its mxfp4 or fp8 weights, but "
                "training dequantised them, so the results may differ from those of other models",
                subject.name,
            )
        name = subject.name.replace("/", "_").replace(" ", "-")
        folder = out.with_name(f"{out.stem}-tasks") / name
        command = harness_command(subject, tasks, folder)
        logger.info("%s: %s", subject.name, shlex.join(["python", *command[1:]]))
        if code := subprocess.run(command, check=False).returncode:
            raise RankZeroError(f"--tasks: lm_eval ended with exit code {code} for {subject.name}")
        logger.info("%s: results in %s", subject.name, folder)


def _tokenizer_folder(subject: Subject) -> Path:
    """The folder of the model's tokenizer. That of the base lacks the tokens of `new_tokens`."""
    if not subject.settings.new_tokens:
        return subject.settings.model_folder
    if subject.is_adapter_used and subject.adapter is not None:
        return subject.adapter
    return subject.folder


def harness_command(subject: Subject, tasks: str, folder: Path) -> list[str]:
    """The command for one model. If training quantised the base, lm_eval quantises it likewise."""
    settings = subject.settings
    arguments: dict[str, Any] = {
        "pretrained": subject.folder,
        "tokenizer": _tokenizer_folder(subject),
        "dtype": "auto",
    }
    if subject.adapter is not None and subject.is_adapter_used:
        arguments["peft"] = subject.adapter
    if settings.trust_remote_code:
        arguments["trust_remote_code"] = "True"
    if settings.is_quantised and not subject.is_merged:
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

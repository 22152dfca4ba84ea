"""Publish an adapter as a PEFT folder: weights, config, tokenizer, model card.

The folder is written to a temporary sibling, read back and verified before it replaces an earlier
one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.adapter.initial import initial_adapter_of, lineage_texts
from pipeline.adapter.merge_output import CHAT_TEMPLATE, TOKENIZER_FILES, copy_files
from pipeline.adapter.serving import bnb_arguments, serving_notes, vllm_command
from pipeline.adapter.trained_on import WEIGHTS, corrected_base, write_trained_on
from pipeline.adapter.verify import verify_adapter_file, verify_tensors
from pipeline.config.settings import RunSettings
from pipeline.data.chat.encoder import chat_template_of
from pipeline.data.chat.tokenizer import run_tokenizer
from pipeline.data.prepare.audit import ends_without_stop
from pipeline.errors import RankZeroError
from pipeline.files import atomic_folder, dump_json, read_json
from pipeline.model.adapter import expected_shapes, lora_config
from pipeline.model.fingerprint import Fingerprint
from pipeline.model.quantised_files import dequantising_config
from pipeline.plan.given.adapter_counts import TOKEN_ROWS
from pipeline.plan.given.new_tokens import token_rows
from pipeline.plan.given.saved_modules import saved_modules
from pipeline.plan.plan import Plan

_CONFIG, _CARD = "adapter_config.json", "README.md"
_PREFIX = "base_model.model."


def publish_adapter(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    step: int,
    base: Fingerprint,
) -> None:
    """Write the adapter folder, on rank 0 only.

    `tensors`: fp32 weights on the CPU, under the keys of peft's adapter file; for PiSSA and OLoRA,
    the result of `on_unchanged_base`. Raises RankZeroError if a check fails; the folder of an
    earlier adapter is then unchanged.
    """
    settings, expected = plan.settings, _saved_shapes(plan)
    started_from = initial_adapter_of(folder.parent, settings)
    config = adapter_config(settings)
    notes = ends_without_stop(folder.parent / "data")
    card = model_card(plan, step, base, started_from, notes)
    verify_tensors(tensors, expected, is_trained=True)
    check_servable(tensors, config)
    copies = _tied_copies(plan)
    expected |= {key: expected[source] for key, source in copies.items()}

    def check(temporary: Path) -> None:
        verify_adapter_file(temporary / WEIGHTS, expected, is_trained=True)
        if read_json(temporary / _CONFIG) != config:
            raise RankZeroError(f"{folder / _CONFIG}: its content differs from what was written")

    try:
        with atomic_folder(folder, check) as temporary:
            weights = {key: tensor.contiguous() for key, tensor in tensors.items()}
            weights |= {key: weights[source].clone() for key, source in copies.items()}
            save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
            (temporary / _CONFIG).write_text(dump_json(config), encoding="utf-8")
            (temporary / _CARD).write_text(card, encoding="utf-8")
            write_trained_on(temporary, settings, base, started_from)
            if settings.new_tokens:
                run_tokenizer(settings).save_pretrained(temporary)
            else:
                copy_files(settings.model_folder, temporary, TOKENIZER_FILES)
            if (template := chat_template_of(settings)) is not None:  # replaces the base's template
                (temporary / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise RankZeroError(f"{folder}: the adapter cannot be written: {error}") from error


def _saved_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the tensors to save; PiSSA and OLoRA have twice the r of training."""
    shapes = expected_shapes(plan)
    if plan.settings.initialises_from_base:
        for key, shape in shapes.items():
            if ".lora_A." in key:
                shapes[key] = (2 * shape[0], shape[1])
            elif ".lora_B." in key:
                shapes[key] = (shape[0], 2 * shape[1])
    return shapes


def _tied_copies(plan: Plan) -> dict[str, str]:
    """Key of a head in the adapter file -> key of the embeddings with which it shares its weight.

    Both are saved, because peft 0.21.2 cannot load an adapter with only one of them
    (utils/save_and_load.py:617).
    """
    return {
        f"{_PREFIX}{module.tied_name}.{name}": f"{_PREFIX}{module.name}.{name}"
        for module in saved_modules(plan.shape, plan.settings)
        for name in module.shapes
        if module.tied_name
    }


def adapter_config(settings: RunSettings) -> dict[str, Any]:
    """Content of adapter_config.json in peft's format, with sorted lists instead of sets."""
    config = lora_config(settings)
    config.base_model_name_or_path = settings.model
    config.revision = settings.model_revision
    config.inference_mode = True
    values: dict[str, Any] = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()  # type: ignore[no-untyped-call]
    }
    if settings.initialises_from_base:  # saved with twice the r, see `on_unchanged_base`
        # The factor of alpha with which the scaling stays the same.
        factor = math.sqrt(2) if settings.use_rslora else 2
        values["r"] *= 2
        values["rank_pattern"] = {key: 2 * r for key, r in settings.rank_pattern.items()}
        values["alpha_pattern"] = {
            key: factor * alpha for key, alpha in settings.alpha_pattern.items()
        }
        values["lora_alpha"] *= factor
    alpha = values["lora_alpha"]  # written as an integer if possible, as serving engines expect
    values["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
    data: dict[str, Any] = json.loads(json.dumps(values))
    return data


def on_unchanged_base(
    tensors: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """An adapter of PiSSA or OLoRA in a form that belongs to the unchanged base.

    In training the base lacks B0 A0, the product of the initial matrices `initial`. So the change
    of the unchanged base is B A - B0 A0, which is one LoRA of twice the r: (B, -B0) times (A over
    A0). Raises RankZeroError if a B is still equal to B0. peft calls this `subtract_mutated_init`
    (0.21.2 tuners/lora/model.py).
    """
    result = dict(tensors)
    for key, initial_tensor in initial.items():
        if ".lora_A." in key:
            result[key] = torch.cat([tensors[key], initial_tensor], dim=0)
            continue
        if torch.equal(tensors[key], initial_tensor):
            raise RankZeroError(f"{key} still has its initial value: no gradient reached it")
        result[key] = torch.cat([tensors[key], -initial_tensor], dim=1)
    return result


def check_servable(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Raise RankZeroError if a serving engine would ignore a part of the adapter.

    vLLM ignores keys with another prefix (vllm#34186, #39278) and allocates `r` columns for each
    matrix. Options that a serving engine rejects are not an error here: the plan's rules name them.
    """
    saved = tuple(f"{_PREFIX}{name}." for name in config.get("modules_to_save") or ())
    problems = []
    for key in tensors:
        is_known = ".lora_" in key or key.startswith(saved) or key.endswith(TOKEN_ROWS)
        if not (is_known and key.startswith(_PREFIX)):
            problems.append(f"{key} is not a key that serving engines read")
    largest_r = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    # Modules whose fused experts are adapted: their matrices have r columns for each expert.
    fused = tuple(name.rpartition(".")[0] for name in config.get("target_parameters") or ())
    for key, tensor in tensors.items():
        if key.partition(".lora_")[0].replace(".base_layer", "").endswith(fused):
            continue
        r = 0
        if ".lora_A." in key:
            r = tensor.shape[0]
        elif ".lora_B." in key:
            r = tensor.shape[-1]
        if r > largest_r:
            problems.append(f"{key} has r {r}, but adapter_config.json has at most {largest_r}")
    if len(dtypes := {tensor.dtype for tensor in tensors.values()}) > 1:
        problems.append(f"tensors have several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RankZeroError(f"serving engines cannot load the adapter: {problems[0]}{more}")


def model_card(
    plan: Plan,
    step: int,
    base: Fingerprint,
    started_from: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Text of the adapter folder's README.md, with YAML metadata for the Hugging Face hub.

    `base`: fingerprint of the base. `started_from`: the record of the run's initial adapter.
    `notes`: texts below the table.
    """
    settings, lineage = plan.settings, lineage_texts(started_from)
    metadata = {
        "base_model": settings.model,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora"],
    }
    quantised = "no"
    if settings.is_quantised:
        quantised = "4-bit" if settings.load_in_4bit else "8-bit"
    revision = f", revision `{settings.model_revision}`" if settings.model_revision else ""
    rows = {
        "base model": f"`{settings.model}`{revision}",
        "fingerprint of the base": f"`{base.digest}`",
        **({"started from": ", which started from ".join(lineage)} if lineage else {}),
        "training data": ", ".join(f"`{source.path}`" for source in settings.train_sources),
        "steps": step,
        "global batch": f"{plan.layout.global_batch_size} sequences of at most "
        f"{settings.max_length} tokens",
        "learning rate": f"{settings.lr:g}, {settings.lr_scheduler_type}",
        "LoRA": f"r {settings.lora_r}, alpha {settings.alpha:g}, dropout {settings.lora_dropout:g}"
        + (f"; saved with r {2 * settings.lora_r}" if settings.initialises_from_base else ""),
        **{f"`{name}`": f"`{value}`" for name, value in settings.adapter_options.items()},
        **({"new tokens": plan.why["new_tokens"]} if settings.new_tokens else {}),
        "base quantised in training": quantised,
        "training dtype": f"{plan.training_dtype}; these files have the fp32 master weights",
        "seed": settings.seed,
        "made with": f"RankZero {version('rankzero')}, peft {version('peft')}, "
        f"transformers {version('transformers')}, torch {version('torch')}",
    }
    # Class of transformers that dequantises a base in 4 or 8 bits; empty for other bases.
    config_class, arguments = dequantising_config(settings.model_folder), "dequantize=True"
    if is_corrected := corrected_base(settings, started_from) is not None:
        config_class, arguments = "BitsAndBytesConfig", bnb_arguments(settings, plan.training_dtype)
    quantization = f"quantization_config={config_class}({arguments}), " if config_class else ""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _CARD_TEXT.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        base=json.dumps(settings.model, ensure_ascii=False),
        revision=f'revision="{settings.model_revision}", ' if settings.model_revision else "",
        resize=_resize_call(plan),
        config_class=f", {config_class}" if config_class else "",
        quantization=quantization,
        table="\n".join([table, *(f"\n{note}" for note in notes)]),
        vllm=vllm_command(settings, "ADAPTER", "MERGED", is_merged=is_corrected),
        serving="".join(f"- {note}\n" for note in serving_notes(plan)),
    )


def _resize_call(plan: Plan) -> str:
    """The line of Python that adds the rows of new tokens to the base.

    Empty if the base has enough rows already, or if there are no new tokens.
    """
    rows = token_rows(plan.shape, plan.settings)
    if rows is None or not plan.shape.added_rows:
        return ""
    call = f"base.resize_token_embeddings({rows.vocab_size}, mean_resizing=False)"
    return f"{call}  # rows of the new tokens\n"


_CARD_TEXT = """\
---
{metadata}---

# LoRA adapter

| | |
|---|---|
{table}

To use it, with `ADAPTER` as the path of this folder:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{config_class}

base = AutoModelForCausalLM.from_pretrained({base}, {revision}{quantization}dtype="auto")
{resize}model = PeftModel.from_pretrained(base, ADAPTER)
tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
```

To serve it, with `MERGED` as the path of the merged model (`rankzero merge`):

```console
{vllm}
```

`rankzero export RUN_FOLDER --gguf` writes the files for llama.cpp and Ollama.

{serving}"""

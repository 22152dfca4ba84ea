"""ModelLoader: loads the models to score, one at a time; each rank holds the whole model."""

import dataclasses
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError

from pipeline.adapter.adapter_file import current_key, read_adapter
from pipeline.cluster.devices import detect_hardware
from pipeline.cluster.progress import show_progress
from pipeline.config.settings import RunSettings
from pipeline.errors import SingleRankError, UserError
from pipeline.evaluate.model_specs import ModelSpec
from pipeline.model.base import DTYPES, load_base, load_plain
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import Plan, make_plan


class ModelLoader:
    """Loads the model that a `ModelSpec` describes, and keeps it until another one is loaded.

    The specs of base and adapter of a run differ only in whether the adapter is active. So their
    model is loaded once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._model: Any = None
        self._loaded_key: Any = None

    @contextmanager
    def loaded(self, spec: ModelSpec) -> Iterator[Any]:
        """The model in evaluation mode; its adapter is disabled for the spec of the base."""
        key = (spec.folder, spec.adapter, spec.is_merged)
        if key != self._loaded_key:
            self._model = self._loaded_key = None
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # frees the memory of the previous model
            with show_progress("loading the model"), report_out_of_memory(spec.name):
                self._model = self._load(spec).eval()
            self._loaded_key = key
        if spec.adapter is None or spec.is_adapter_used:
            yield self._model
        else:
            with self._model.disable_adapter():
                yield self._model

    def _load(self, spec: ModelSpec) -> Any:
        """Base and adapter, quantised as in training; or a merged model in the training dtype."""
        plan = single_process_plan(spec.settings)
        if spec.is_merged:
            model: Any = load_plain(
                spec.folder,
                dtype=DTYPES[plan.training_dtype],
                trust_remote_code=spec.settings.trust_remote_code,
            )
            return model.to(self._device)
        base = load_base(plan, self._device)
        if spec.adapter is None:
            return base
        return _with_adapter(base, spec.adapter)


def _with_adapter(base: Any, adapter: Path) -> PeftModel:
    """The base with an adapter. Raises UserError unless peft loads each LoRA weight of its file.

    peft itself only warns about a weight that it does not find, which then changes nothing, and
    ignores a weight of another layer.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False)
    except NoMatchingPeftModuleError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{adapter}: its layers are not in the base: {reason}") from None
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{adapter}: its weights do not have the sizes of the base: {reason}"
        ) from None
    assert isinstance(model, PeftModel)
    # Blocks that share their weights (Zamba) have several keys in the model, and one in the file.
    named = dict(model.named_parameters(remove_duplicate=False))
    in_model = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    in_file = {current_key(key) for key in read_adapter(adapter).file.entries}
    loaded_ids = {id(in_model[key]) for key in in_file & in_model.keys()}
    missing = {key for key, parameter in in_model.items() if id(parameter) not in loaded_ids}
    differing = sorted(key for key in missing | (in_file - in_model.keys()) if ".lora_" in key)
    if differing:
        raise UserError(
            f"{adapter}: {len(differing)} weights are either not in its file, or not of the layers "
            f"that its adapter_config.json names, such as {differing[0]}; restore the adapter"
        )
    return model


@contextmanager
def report_out_of_memory(name: str) -> Iterator[None]:
    """Convert torch's OutOfMemoryError in the body to a SingleRankError about the model `name`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SingleRankError(
            f"{name}: does not fit on one device, and each rank holds the whole model; "
            f"add load_in_4bit=true to the command to quantise the base ({str(error)[:200]})"
        ) from None


def single_process_plan(settings: RunSettings) -> Plan:
    """A plan for loading the model on one device, without sharding and activation checkpointing."""
    # These settings of the run may need several ranks, or apply only to training.
    unsharded = settings.model_copy(
        update={
            "zero_stage": "auto",
            "gradient_checkpointing": "auto",
            "batch_size": 1,
            "gradient_accumulation_steps": "auto",
            "global_batch_size": "auto",
            "hpz_partition_size": "auto",
            "sequence_parallel_size": "auto",
            "offload_param": "auto",
            "offload_activations": "auto",
            "mlp_tiles": "auto",
            "deepspeed_json": None,
        }
    )
    # Nothing is trained, so the memory that training would need is not a reason to refuse the plan.
    unlimited = dataclasses.replace(detect_hardware(), device_bytes=2**50)
    shape = read_shape(str(settings.model_folder), trust_remote_code=settings.trust_remote_code)
    return make_plan(unsharded, shape, unlimited, nodes=1, ranks_per_node=1)

"""Loading of a base at ZeRO-3, such that no rank and no host ever holds the whole base.

Each parameter is read from the files, and quantised if the run has a 4-bit base, by one rank only.
Eight ranks read the next eight parameters at the same time, one each. Then all ranks receive these
parameters one after another, and keep their shards.

A parameter is quantised whole, because with double quantisation its values depend on the mean of
all its scales. The quantisation constants are small, and stay whole on each rank.

transformers 5.23 would quantise the whole base on each rank, and read an unquantised base whole on
rank 0.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from torch import distributed, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import core_model_loading, modeling_utils
from transformers.core_model_loading import SkipParameters, WeightConverter, WeightRenaming

from pipeline.plan.plan import Plan


@contextmanager
def sharded_while_loading(plan: Plan, device: torch.device) -> Iterator[None]:
    """Within this context, transformers' `from_pretrained` is collective and shards the model.

    The `device_map` of the call must map the whole model to `device`.
    """
    import deepspeed

    sharding = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=dict(plan.deepspeed))
    set_parameter = core_model_loading.set_param_for_module
    are_whole_equal = modeling_utils._tied_params_are_equal  # type: ignore[attr-defined]

    def set_and_shard(model: Any, name: str, value: torch.Tensor, *others: Any) -> None:
        set_parameter(model, name, value, *others)
        parameter = model.get_parameter_or_buffer(name)
        # A value whose shape differs from config.json is not set. load_plain() raises an error.
        if isinstance(parameter, nn.Parameter) and not parameter.is_meta:
            sharding._convert_to_deepspeed_param(parameter)
            parameter.partition()  # type: ignore[attr-defined]
            # transformers keeps its reference to the value until it sets the next one.
            value.data = parameter.data  # empty

    def are_tied_equal(source: Any, target: Any) -> bool:
        if not (hasattr(source, "ds_tensor") and hasattr(target, "ds_tensor")):
            return bool(are_whole_equal(source, target))
        return _are_equal(source, target, device)

    def shared(
        conversions: Iterable[tuple[str, WeightRenaming | WeightConverter]], **options: Any
    ) -> Any:
        del options  # of the progress bar
        return _shared_conversions(conversions, device)

    with (
        # transformers calls tqdm on the parameters to load; its replacement shares the work.
        patch.object(core_model_loading, "tqdm", shared),
        patch.object(core_model_loading, "set_param_for_module", set_and_shard),
        patch.object(modeling_utils, "_tied_params_are_equal", are_tied_equal),
        # This function would allocate memory for the whole model on a GPU.
        patch.object(modeling_utils, "caching_allocator_warmup", lambda *arguments: None),
        # Sets HF_DEACTIVATE_ASYNC_LOAD: otherwise threads would read all parameters on each rank.
        patch.object(core_model_loading, "is_env_variable_true", lambda name: True),
    ):
        yield


def _are_equal(first: Any, second: Any, device: torch.device) -> bool:
    """Whether two sharded parameters have the same values. Collective."""
    num_in_shard = first.ds_tensor.numel()
    num_remaining = first.ds_numel - distributed.get_rank() * num_in_shard
    num_values = max(0, min(num_in_shard, num_remaining))  # without padding
    shards = (each.ds_tensor[:num_values] for each in (first, second))
    is_equal = first.ds_shape == second.ds_shape and torch.equal(*shards)
    num_equal = torch.tensor(int(is_equal), device=device)
    distributed.all_reduce(num_equal)
    return int(num_equal) == distributed.get_world_size()


def _shared_conversions(
    conversions: Iterable[tuple[str, WeightRenaming | WeightConverter]], device: torch.device
) -> Iterator[tuple[str, "_SharedConversion"]]:
    """The names of parameters, with conversions that only one rank executes for all."""
    rank, remaining = distributed.get_rank(), iter(conversions)
    while group := list(islice(remaining, distributed.get_world_size())):  # one for each rank
        own = _OwnConversion(*group[rank], device) if rank < len(group) else None
        for source, (name, _) in enumerate(group):
            yield name, _SharedConversion(source, own, device)


@dataclass
class _OwnConversion:
    """A conversion that this rank executes. It reads tensors of the files and quantises them.

    `results`: name of a parameter -> its value. `error`: why there are none.
    """

    name: str
    conversion: WeightRenaming | WeightConverter
    device: torch.device
    results: dict[str, torch.Tensor] = field(default_factory=dict)
    error: str | None = None

    def execute(self, loading_info: Any, options: dict[str, Any]) -> None:
        try:
            converted = self.conversion.convert(self.name, loading_info=loading_info, **options)
        except SkipParameters:  # transformers has recorded the error
            self.error = loading_info.conversion_errors[self.name]
        except (OSError, ValueError, SafetensorError) as error:
            self.error = f"{self.name}: {error}"
        else:
            for name, value in converted.items():
                result: Any = value[0] if isinstance(value, list) else value
                # transformers converts some very large tensors on the CPU
                is_moved = getattr(self.conversion, "force_cpu", False)
                self.results[name] = result.to(self.device) if is_moved else result


@dataclass(frozen=True)
class _SharedConversion:
    """A conversion that rank `source` executes; transformers calls its method `convert`.

    `own`: the conversion of the same group that this rank executes, if there is one.
    """

    source: int
    own: _OwnConversion | None
    device: torch.device

    def convert(
        self, name: str, model: Any, loading_info: Any, **options: Any
    ) -> dict[str, torch.Tensor]:
        """Name of a parameter -> its value. Collective.

        Raises ValueError on all ranks if `source` could not execute the conversion.
        """
        if self.own is not None and self.source == 0:  # the first conversion of the group
            self.own.execute(loading_info, options | {"model": model})
        sender = self.own if distributed.get_rank() == self.source else None
        parameters: dict[str, dict[str, Any]] = {}
        metadata: list[Any] = [None]
        if sender is not None:
            parameters = {key: _to_dict(value) for key, value in sender.results.items()}
            metadata = [(sender.error, tree_map_only(torch.Tensor, _without_values, parameters))]
        distributed.broadcast_object_list(metadata, self.source)
        error, shapes = metadata[0]
        if error is not None:
            raise ValueError(error)
        if sender is None:
            parameters = tree_map_only(torch.Tensor, self._empty, shapes)
        for tensor in tree_leaves(parameters):
            if isinstance(tensor, torch.Tensor):
                # as bytes, because gloo does not know all dtypes
                distributed.broadcast(tensor.reshape(-1).view(torch.uint8), self.source)
        if sender is not None:
            results, sender.results = sender.results, {}
            return results
        return {key: self._from_dict(key, entries, model) for key, entries in parameters.items()}

    def _empty(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=self.device)

    def _from_dict(self, name: str, entries: dict[str, Any], model: nn.Module) -> torch.Tensor:
        """The parameter that another rank has sent as a dictionary."""
        values: torch.Tensor = entries.pop("values")
        if not entries:
            return values
        from bitsandbytes.nn.modules import Params4bit

        module: Any = model.get_submodule(name.rpartition(".")[0])
        module._is_hf_initialized = True  # as transformers does when it quantises
        return Params4bit.from_prequantized(values, entries, device=self.device, module=module)


def _to_dict(parameter: Any) -> dict[str, Any]:
    """The values of a parameter and, if it is quantised, bitsandbytes' quantisation constants."""
    state = getattr(parameter, "quant_state", None)
    entries = {"values": parameter.data} | (state.as_dict() if state else {})
    contiguous: dict[str, Any] = tree_map_only(torch.Tensor, torch.Tensor.contiguous, entries)
    return contiguous


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")

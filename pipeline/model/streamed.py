"""Streamed models: the weights of a block are read when the block runs, and released after it.

So a forward pass needs only the memory of one block, the embeddings and the head. It computes in
fp32.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.model.attention import WITHIN_DOCUMENTS
from pipeline.model.base import auto_class, model_config
from pipeline.model.checkpoint_names import built_parameter, stored_names
from pipeline.model.quantised_checkpoint import read_tensor
from pipeline.model.quantised_files import checkpoint_files
from pipeline.model.structure import blocks

# Names of peft's wrapper modules. Without them and _PREFIX, the name of a parameter in a peft model
# is its name in the base.
_WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
_PREFIX = "base_model.model."

# Function from the name of a layer, the layer and its weight, which it changes in place.
Transform = Callable[[str, nn.Module, torch.Tensor], None]


def streamed_model(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model of a folder with its parameters on the meta device; buffers have their values."""
    options = {"trust_remote_code": trust_remote_code}
    config = model_config(folder, **options)
    with _parameters_on_meta():
        model = auto_class(folder, trust_remote_code).from_config(
            config, dtype=torch.float32, attn_implementation=WITHIN_DOCUMENTS, **options
        )
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While this context is active, modules are built with parameters on the meta device.

    Their buffers have values, as with accelerate's `init_empty_weights`.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class StreamedWeights:
    """Weights of a model folder for its streamed model, to which adapters may be attached later.

    `on_read` is called with the bytes of each tensor that was read. `transform` changes weights
    that were read. `adapters`: name of an attached adapter -> tensors of its file, which stay in
    memory.
    """

    adapters: Mapping[str, Mapping[str, torch.Tensor]] = {}

    def __init__(
        self, folder: Path, causal: Any, on_read: Callable[[int], None], transform: Transform | None
    ) -> None:
        self._causal, self._on_read, self._transform = causal, on_read, transform
        self._entries = {
            key: (file.path, entry)
            for file in checkpoint_files(folder)
            for key, entry in file.entries.items()
        }
        self._stored = stored_names(causal, self._entries)
        self._tied: dict[str, str] = dict(causal.all_tied_weights_keys)
        self._tied_values: dict[str, torch.Tensor] = {}

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """While this context is active, load each block's weights only for its forward pass.

        Weights outside the blocks are loaded at the start and released at the end.
        """
        names = {module: name for name, module in model.named_modules()}
        in_blocks: set[nn.Module] = set()
        handles = []
        for block in blocks(self._causal):
            in_blocks.update(block.modules())
            handles.append(block.register_forward_pre_hook(self._loading_hook(names[block])))
            handles.append(block.register_forward_hook(_release_block))
        outside = [(name, module) for module, name in names.items() if module not in in_blocks]
        for name, module in outside:
            self._load(name, module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for _, module in outside:
                _release(module)
            self._tied_values.clear()

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter of the model's class, by its name in memory, in fp32."""
        return self._value(name, nn.Module()).clone()

    def _loading_hook(self, name: str) -> Any:
        """Forward pre-hook that loads the weights of the block with this name."""

        def load(block: nn.Module, arguments: Any) -> None:
            del arguments
            for name_in_block, module in block.named_modules():
                self._load(f"{name}.{name_in_block}" if name_in_block else name, module)

        return load

    def _load(self, name: str, module: nn.Module) -> None:
        """Replace the parameters of a module that are on the meta device."""
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = self._value(f"{name}.{key}", module)
                if (num_missing := parameter.shape[0] - value.shape[0]) > 0:
                    # rows of new tokens, whose values are in the adapter
                    value = F.pad(value, (0, 0, 0, num_missing))
                loaded = nn.Parameter(value, requires_grad=False)
                loaded.is_streamed = True  # type: ignore[attr-defined]
                module._parameters[key] = loaded

    def _adapter_value(self, name: str) -> torch.Tensor | None:
        """The value of a parameter in an attached adapter; None if it comes from the base.

        An adapter has LoRA matrices, and may replace parameters of the base (`modules_to_save`).
        The keys of its file are names of parameters without the name of the adapter and without
        `modules_to_save`. A parameter of `original_module` is the base's, which peft keeps next to
        the replacement.
        """
        for adapter, tensors in self.adapters.items():
            key = re.sub(rf"(\.modules_to_save)?\.{adapter}(?=\.|$)", "", name, count=1)
            is_of_adapter = key != name or "original_module" not in name
            value = tensors.get(key, tensors.get(key.removesuffix(".weight")))
            if value is not None and is_of_adapter:
                return value.float()
        return None

    def _value(self, name: str, module: nn.Module) -> torch.Tensor:
        """The value of the parameter with this name, from an adapter or from the base."""
        if (value := self._adapter_value(name)) is not None:
            return value
        base_name = _WRAPPERS.sub("", f".{name.removeprefix(_PREFIX)}")[1:]
        if base_name not in self._stored:
            base_name = self._tied.get(base_name, base_name)
        if base_name in self._tied_values:
            return self._tied_values[base_name]
        value = self._built_value(name, base_name, module)
        if base_name in self._tied.values():
            self._tied_values[base_name] = value
        return value

    def _built_value(self, name: str, base_name: str, module: nn.Module) -> torch.Tensor:
        """The parameter `base_name` of the model's class, built from its tensors in the files."""
        if (stored := self._stored.get(base_name)) is None:
            raise UserError(f"{name}: no weight of the model's files belongs to this parameter")
        tensors = {key: self._read_tensor(key) for key in stored.keys}
        if stored.converter is None:
            value = tensors[stored.keys[0]]
        else:
            value = built_parameter(self._causal, base_name, stored, tensors)
        if self._transform is not None:
            self._transform(base_name.rpartition(".")[0], module, value)
        return value

    def _read_tensor(self, key: str) -> torch.Tensor:
        path, entry = self._entries[key]
        tensor = read_tensor(path, key, entry)
        self._on_read(tensor.nbytes)
        return tensor.float()


def _release_block(block: nn.Module, arguments: Any, output: Any) -> None:
    """Forward hook that releases the weights of a block."""
    del arguments, output
    for module in block.modules():
        _release(module)


def _release(module: nn.Module) -> None:
    """Move the parameters of a module that were loaded back to the meta device."""
    for key, parameter in module._parameters.items():
        if getattr(parameter, "is_streamed", False):
            assert parameter is not None
            module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)

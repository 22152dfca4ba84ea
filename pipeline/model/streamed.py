"""Models that are computed block by block: weights are read when a block runs, then released.

A forward pass needs the memory of one block, the embeddings and the head, whatever the size of the
model. It computes in fp32.
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
from pipeline.model.packed import read_tensor
from pipeline.model.packed_files import checkpoint_files
from pipeline.model.structure import blocks

# Names of peft's wrapper modules, which are not in a parameter's name in the base.
_WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
_PREFIX = "base_model.model."

# A function that changes a weight in place, given the name of its layer.
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
    """Modules that are built inside have parameters on the meta device, as with accelerate."""
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
    """Weights of a model folder, for its streamed model, to which adapters may be attached later.

    `on_read` is called with the size of each tensor; `transform` changes weights that were read.
    `adapters`: name of an attached adapter -> tensors of its file, which stay in memory.
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
        inside: set[nn.Module] = set()
        handles = []
        for name, block in _named(model, blocks(self._causal)):
            inside.update(block.modules())
            handles.append(block.register_forward_pre_hook(self._loader(name)))
            handles.append(block.register_forward_hook(self._releaser()))
        outside = [(name, each) for name, each in model.named_modules() if each not in inside]
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

    def _loader(self, name: str) -> Any:
        def load(block: nn.Module, arguments: Any) -> None:
            del arguments
            for inner, module in block.named_modules():
                self._load(f"{name}.{inner}" if inner else name, module)

        return load

    def _releaser(self) -> Any:
        def release(block: nn.Module, arguments: Any, output: Any) -> None:
            del arguments, output
            for module in block.modules():
                _release(module)

        return release

    def _load(self, name: str, module: nn.Module) -> None:
        """Replace the parameters of a module that are on the meta device."""
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = self._value(f"{name}.{key}", module)
                if (missing := parameter.shape[0] - value.shape[0]) > 0:
                    value = F.pad(value, (0, 0, 0, missing))  # rows that an adapter replaces
                loaded = nn.Parameter(value, requires_grad=False)
                loaded.is_streamed = True  # type: ignore[attr-defined]
                module._parameters[key] = loaded

    def _adapter_value(self, name: str) -> torch.Tensor | None:
        """The value of a parameter in an attached adapter; None if it comes from the base.

        An adapter has its own matrices, and may replace parameters of the base (`modules_to_save`).
        Its file has keys without the name of the adapter and without `modules_to_save`.
        """
        for adapter, tensors in self.adapters.items():
            key = re.sub(rf"(\.modules_to_save)?\.{adapter}(?=\.|$)", "", name, count=1)
            is_own = key != name or "original_module" not in name
            value = tensors.get(key, tensors.get(key.removesuffix(".weight")))
            if value is not None and is_own:
                return value.float()
        return None

    def _value(self, name: str, module: nn.Module) -> torch.Tensor:
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
        tensors = {key: self._read(key) for key in stored.keys}
        if stored.converter is None:
            value = tensors[stored.keys[0]]
        else:
            value = built_parameter(self._causal, base_name, stored, tensors)
        if self._transform is not None:
            self._transform(base_name.rpartition(".")[0], module, value)
        return value

    def _read(self, key: str) -> torch.Tensor:
        path, entry = self._entries[key]
        tensor = read_tensor(path, key, entry)
        self._on_read(tensor.nbytes)
        return tensor.float()


def _named(model: nn.Module, modules: list[nn.Module]) -> list[tuple[str, nn.Module]]:
    names = {module: name for name, module in model.named_modules()}
    return [(names[module], module) for module in modules]


def _release(module: nn.Module) -> None:
    for key, parameter in module._parameters.items():
        if getattr(parameter, "is_streamed", False):
            assert parameter is not None
            module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)

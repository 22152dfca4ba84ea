"""The linear layers of a model that get a LoRA adapter, and the sizes of the adapter.

The adapter may also have matrices for experts, and rows for new tokens. The experts of a block are
"fused": one tensor holds the weights of all of them. Modules that are trained in full are not
counted here, but in saved_modules.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.given.families import ExpertTensor, Linear
from pipeline.plan.given.new_tokens import token_rows
from pipeline.plan.given.patterns import full_matches
from pipeline.plan.given.saved_modules import saved_modules, saved_parameters
from pipeline.plan.given.shape import ModelShape

# End of the key in the adapter file for the trained rows of new tokens.
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
# Last parts of the names of linear layers, by the tensor that they read.
_ATTENTION_INPUT = {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"}
_ATTENTION_OUTPUT = {"o_proj", "dense"}
_MLP_INPUT = {"gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"}


@dataclass(frozen=True, kw_only=True)
class AdaptedLayer:
    """A linear layer, or a fused tensor of experts, that gets an adapter.

    `name`: of a linear layer in `named_modules()` of the base, of a fused tensor in its
    `named_parameters()`. `linear`: sizes of the layer, or of one expert. `r`: the r of this
    layer's adapter, or of each expert. `scaling`: factor of the product of B and A.
    `has_magnitude`: whether it has the magnitude vector of DoRA.
    """

    name: str
    linear: Linear
    r: int
    scaling: float
    has_magnitude: bool
    num_experts: int = 1

    @property
    def parameters(self) -> int:
        """Trainable parameters: A is (r, d_in), B is (d_out, r), a magnitude has d_out values."""
        d_in, d_out = self.linear.d_in, self.linear.d_out
        matrices = self.r * self.num_experts * (d_in + d_out)
        return matrices + (d_out if self.has_magnitude else 0)


@dataclass(frozen=True, kw_only=True)
class AdapterCounts:
    """Sizes of the adapter, summed over a whole model or over all its blocks of one kind.

    A width is summed over the adapted linear layers. If experts are adapted, `parameters` and
    `largest_matrix` include their adapter. In the sum over a model, `parameters`, `largest_matrix`
    and `largest_linear_matrix` also include the rows of new tokens.
    """

    layers: int  # number of adapted linear layers
    parameters: int  # trainable parameters of the adapter
    inner_width: int  # sum of r
    largest_matrix: int  # elements of the largest A or B
    largest_linear_matrix: int  # elements of the largest A or B of a linear layer, or token rows
    base_weights: int  # sum of d_in x d_out
    input_width: int  # sum of d_in
    output_width: int  # sum of d_out
    blocks_reading_attention_input: int  # number of blocks in which an adapter reads this tensor
    blocks_reading_attention_output: int
    blocks_reading_mlp_input: int
    other_input_width: int  # sum of d_in of layers that read another input (down projection)
    expert_parameters: int  # trainable parameters of the adapter of experts
    adapted_experts: int  # elements of the fused expert tensors that are adapted
    largest_expert_tensor: int  # elements of the largest of these tensors


def adapter_counts(shape: ModelShape, settings: RunSettings) -> AdapterCounts:
    """Sizes of the whole adapter. Raises UserError if a setting selects or matches no layer.

    The shape of A is (r, d_in) and that of B is (d_out, r) (LoRA, arXiv 2106.09685 s.4). For a
    fused tensor of n experts they are (n r, d_in) and (d_out, n r), which is r for each expert
    (peft 0.21.2 tuners/lora/layer.py ParamWrapper.update_layer).
    """
    counts = _cached_counts(shape, _Selection.of(settings))[0]
    if (rows := token_rows(shape, settings)) is None:
        return counts
    matrix = len(rows.ids) * shape.hidden_size
    return replace(
        counts,
        parameters=counts.parameters + matrix * len(rows.modules),
        largest_matrix=max(counts.largest_matrix, matrix),
        largest_linear_matrix=max(counts.largest_linear_matrix, matrix),
    )


def adapter_counts_by_kind(
    shape: ModelShape, settings: RunSettings, *, has_mlp: bool = True
) -> tuple[AdapterCounts, ...]:
    """Sizes of the adapter in the blocks of each kind, in the order of `shape.blocks`.

    `has_mlp`: whether the adapted layers of MLPs are included.
    """
    _, all_layers, without_mlps = _cached_counts(shape, _Selection.of(settings))
    return all_layers if has_mlp else without_mlps


def lora_scaling(r: int, alpha: float, *, use_rslora: bool) -> float:
    """The factor of the product of B and A in a LoRA layer's output."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def trainable_parameters(shape: ModelShape, settings: RunSettings) -> int:
    """Number of trainable parameters: of the adapter, and of modules that are trained in full."""
    return adapter_counts(shape, settings).parameters + saved_parameters(shape, settings)


def pattern_value(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of `rank_pattern` or `alpha_pattern` for a layer.

    It is the value of the first key that matches the layer's name, or `default` if none does. As in
    peft, a key is a regular expression for the whole name, or for its end after a dot (peft
    0.21.2 utils/other.py get_pattern_key).
    """
    for key, value in (pattern or {}).items():
        if full_matches(rf"(.*\.)?({key})", [name], "rank_pattern or alpha_pattern"):
            return value
    return default


def input_of(name: str) -> str:
    """A name for the input of a layer, which is the same for all layers that read this input.

    For example, it is `layers.3.self_attn.k_proj` for q_proj, k_proj and v_proj of this module.
    """
    module, _, last = name.rpartition(".")
    for inputs in (_ATTENTION_INPUT, _MLP_INPUT):
        if last in inputs:
            return f"{module}.{min(inputs)}"
    return name


def adapted_layers(shape: ModelShape, settings: RunSettings) -> tuple[AdaptedLayer, ...]:
    """The layers that get an adapter. Raises UserError if a setting selects or matches no layer."""
    return _select_layers(shape, _Selection.of(settings))


def adapted_experts(shape: ModelShape, settings: RunSettings) -> dict[str, AdaptedLayer]:
    """Name of peft's LoRA layer for each adapted tensor of fused experts -> this tensor.

    peft wraps the module of the experts once for each of its tensors, in their order in the module
    (peft 0.21.2 tuners/tuners_utils.py _inject_parameters). So the last tensor has the name of the
    module, and the tensors before it have the names of its nested `base_layer`.
    """
    modules: dict[str, list[AdaptedLayer]] = {}
    for name, tensor in shape.targeted_experts(settings.lora_target_modules):
        layer = AdaptedLayer(
            name=name,
            linear=Linear(tensor.name, tensor.d_in, tensor.d_out),
            r=settings.lora_r,
            scaling=lora_scaling(settings.lora_r, settings.alpha, use_rslora=settings.use_rslora),
            has_magnitude=False,
            num_experts=tensor.count,
        )
        modules.setdefault(name.rpartition(".")[0], []).append(layer)
    return {
        module + ".base_layer" * depth: layer
        for module, layers in modules.items()
        for depth, layer in enumerate(reversed(layers))
    }


def adapter_shapes(shape: ModelShape, settings: RunSettings) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the trained tensors, as peft names them in the adapter file.

    The tensors of fused experts are not included, because their keys depend on how peft wraps them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in adapted_layers(shape, settings):
        prefix = f"base_model.model.{layer.name}"
        shapes[f"{prefix}.lora_A.weight"] = (layer.r, layer.linear.d_in)
        shapes[f"{prefix}.lora_B.weight"] = (layer.linear.d_out, layer.r)
        if layer.has_magnitude:
            shapes[f"{prefix}.lora_magnitude_vector"] = (layer.linear.d_out,)
    for module in saved_modules(shape, settings):
        for name, size in module.shapes.items():
            shapes[f"base_model.model.{module.name}.{name}"] = size
    if (rows := token_rows(shape, settings)) is not None:
        size = (len(rows.ids), shape.hidden_size)
        shapes |= {f"base_model.model.{name}{TOKEN_ROWS}": size for name in rows.modules}
    return shapes


@dataclass(frozen=True)
class _Selection:
    """The settings that select the adapted layers, their r and their scaling; a cache key."""

    targets: str | tuple[str, ...]
    layers: tuple[int, ...]
    excluded: str | tuple[str, ...]
    r: int
    rank_pattern: tuple[tuple[str, int], ...]
    alpha: float
    alpha_pattern: tuple[tuple[str, float], ...]
    use_rslora: bool
    use_dora: bool

    @classmethod
    def of(cls, settings: RunSettings) -> "_Selection":
        targets, excluded = settings.lora_target_modules, settings.exclude_modules
        return cls(
            targets if isinstance(targets, str) else tuple(targets),
            tuple(settings.layers_to_transform),
            excluded if isinstance(excluded, str) else tuple(excluded),
            settings.lora_r,
            tuple(settings.rank_pattern.items()),
            settings.alpha,
            tuple(settings.alpha_pattern.items()),
            settings.use_rslora,
            settings.use_dora,
        )


@lru_cache(maxsize=16)
def _select_layers(shape: ModelShape, selection: _Selection) -> tuple[AdaptedLayer, ...]:
    """The adapted layers of a selection. Raises UserError if a setting matches no layer."""
    linears = dict(shape.targeted(selection.targets))
    names = _names_in_blocks(shape, selection.layers, list(linears))
    names = _without_excluded(shape, selection.excluded, names)
    if not names and not shape.targeted_experts(selection.targets):
        raise UserError(
            "lora_target_modules, layers_to_transform and exclude_modules together select no layer"
        )
    rank_pattern, alpha_pattern = dict(selection.rank_pattern), dict(selection.alpha_pattern)
    _require_matches("rank_pattern", rank_pattern, names)
    _require_matches("alpha_pattern", alpha_pattern, names)
    layers = []
    for name in names:
        r = int(pattern_value(rank_pattern, name, selection.r))
        alpha = pattern_value(alpha_pattern, name, selection.alpha)
        scaling = lora_scaling(r, alpha, use_rslora=selection.use_rslora)
        layers.append(
            AdaptedLayer(
                name=name,
                linear=linears[name],
                r=r,
                scaling=scaling,
                has_magnitude=selection.use_dora,
            )
        )
    return tuple(layers)


def _require_matches(setting: str, pattern: Mapping[str, float], names: Sequence[str]) -> None:
    """Raise UserError for a key of rank_pattern or alpha_pattern that matches no layer."""
    for key in pattern:
        if not any(pattern_value({key: 1}, name, 0) for name in names):
            raise UserError(f"{setting}: {key!r} matches no adapted layer, such as {names[0]}")


def _names_in_blocks(shape: ModelShape, layers: Sequence[int], names: list[str]) -> list[str]:
    """The names in the blocks with these indices; all of them if `layers` is empty."""
    for layer in layers:
        if not 0 <= layer < shape.num_layers:
            raise UserError(
                f"layers_to_transform: {layer} is not a block of {shape.folder}, whose blocks are "
                f"0 to {shape.num_layers - 1}"
            )
    return [name for name in names if not layers or shape.layer_of(name) in layers]


def _without_excluded(
    shape: ModelShape, excluded: str | Sequence[str], names: list[str]
) -> list[str]:
    """The names that no entry of exclude_modules matches; a single text is a pattern."""
    remaining = names
    is_pattern = isinstance(excluded, str)
    for entry in [excluded] if isinstance(excluded, str) else excluded:
        matches = set(shape.matching(entry, "exclude_modules", is_pattern=is_pattern))
        if not matches & set(names):
            raise UserError(f"exclude_modules: {entry!r} matches none of the layers to adapt")
        remaining = [name for name in remaining if name not in matches]
    return remaining


@lru_cache(maxsize=16)
def _cached_counts(
    shape: ModelShape, selection: _Selection
) -> tuple[AdapterCounts, tuple[AdapterCounts, ...], tuple[AdapterCounts, ...]]:
    """Sizes of the adapter: of the model, by kind of block, and by kind of block without MLPs."""
    selected, r = _select_layers(shape, selection), selection.r
    experts = shape.targeted_experts(selection.targets)

    def by_kind(layers: Sequence[AdaptedLayer]) -> tuple[AdapterCounts, ...]:
        return tuple(
            _sum_counts(
                [layer for layer in layers if shape.kind_of(layer.name) == kind],
                [tensor for name, tensor in experts if shape.kind_of(name) == kind],
                r,
            )
            for kind in range(len(shape.blocks))
        )

    outside_mlps = [layer for layer in selected if "mlp." not in layer.linear.name]
    total = _sum_counts(selected, [tensor for _, tensor in experts], r)
    return total, by_kind(selected), by_kind(outside_mlps)


def _sum_counts(
    selected: Sequence[AdaptedLayer], experts: Sequence[ExpertTensor], r: int
) -> AdapterCounts:
    """Sums over these adapted layers and fused expert tensors; `r`: of the adapter of experts."""
    linears = [layer.linear for layer in selected]
    largest_of_linears = max(
        (layer.r * max(layer.linear.d_in, layer.linear.d_out) for layer in selected), default=0
    )
    largest_of_experts = r * max(
        (tensor.count * max(tensor.d_in, tensor.d_out) for tensor in experts), default=0
    )
    expert_parameters = sum(r * tensor.count * (tensor.d_in + tensor.d_out) for tensor in experts)
    return AdapterCounts(
        layers=len(linears),
        parameters=sum(layer.parameters for layer in selected) + expert_parameters,
        inner_width=sum(layer.r for layer in selected),
        largest_matrix=max(largest_of_linears, largest_of_experts),
        largest_linear_matrix=largest_of_linears,
        expert_parameters=expert_parameters,
        adapted_experts=sum(tensor.parameters for tensor in experts),
        largest_expert_tensor=max((tensor.parameters for tensor in experts), default=0),
        base_weights=sum(linear.d_in * linear.d_out for linear in linears),
        input_width=sum(linear.d_in for linear in linears),
        output_width=sum(linear.d_out for linear in linears),
        blocks_reading_attention_input=_blocks_with(selected, _ATTENTION_INPUT),
        blocks_reading_attention_output=_blocks_with(selected, _ATTENTION_OUTPUT),
        blocks_reading_mlp_input=_blocks_with(selected, _MLP_INPUT),
        other_input_width=sum(linear.d_in for linear in linears if _reads_other_input(linear)),
    )


def _blocks_with(selected: Sequence[AdaptedLayer], names: set[str]) -> int:
    """Number of blocks that have an adapted layer with one of these names."""
    matching = [layer for layer in selected if layer.linear.last_part in names]
    return len({layer.name.removesuffix(f".{layer.linear.name}") for layer in matching})


def _reads_other_input(linear: Linear) -> bool:
    return linear.last_part not in _ATTENTION_INPUT | _ATTENTION_OUTPUT | _MLP_INPUT

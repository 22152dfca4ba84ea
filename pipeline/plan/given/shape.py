"""ModelShape: sizes and module names of a model, from its config.json alone. No weights, no torch.

The linear layers of a block have the same names as in the loaded model, so that adapter parameters
can be counted before the model is loaded. families.py is a table of the layers for known values of
`model_type`. For any other value, class_shape.py builds the model's class without weights, in a
subprocess. tests/plan/given/test_shape.py compares the counts with those of transformers and peft
on the meta device.

The experts of a block are "fused" if one tensor holds the weights of all of them. Full names are
those of `named_modules()`, such as `model.layers.3.self_attn.q_proj`.
"""

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import require_json
from pipeline.plan.given.block import (
    Block,
    block_of_class,
    blocks_of_family,
    positive_integer,
)
from pipeline.plan.given.class_shape import class_shape
from pipeline.plan.given.families import FAMILIES, Config, ExpertTensor, Linear
from pipeline.plan.given.objective import bidirectional_entry, other_head
from pipeline.plan.given.patterns import full_matches
from pipeline.plan.given.positions import max_positions, require_window, rope_original_length
from pipeline.plan.given.tokens import required_vocab_size

# Values of quant_method in config.json whose checkpoints are dequantised to bf16 while they are
# loaded.
DEQUANTISED = ("mxfp4", "fp8")
# Entry of lora_target_modules that means the fused experts of all blocks.
EXPERTS = "experts"
# Names of the experts and of their projections. In older transformers these were linear layers.
_EXPERT_NAMES = ("experts", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Matches the names of routers and of the gates of shared experts, such as `mlp.gate` and
# `router.proj`, but not `mlp.gate_proj`.
_ROUTER = re.compile(r"(^|.*[._])(gate|router)($|\.)")
# Largest accepted numbers of layers and experts, by the end of the key in config.json. Counting a
# model with more would take minutes.
_LARGEST_COUNTS = ((re.compile(r"layers?$"), 10_000), (re.compile(r"experts?$"), 100_000))
# Matches the keys of config.json whose values are sizes.
_SIZE_KEY = re.compile(r"(layers?|experts?|heads?|size|dim|width|n_embd|n_inner|d_model|tok)$")
_LARGEST_SIZE = 10**9  # largest accepted value of the other sizes: widths, heads, vocabularies
# Keys of config.json that set dropout or noise in training.
_DROPOUTS = (
    "attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop",
    "hidden_dropout", "residual_dropout", "router_jitter_noise",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of a decoder: embeddings, blocks of one or more kinds, and a head.

    `folder`: the model folder, or the name of a published model without a folder. `blocks`: one
    Block for each kind, such as dense and mixture of experts. `layer_kinds`: for each layer, the
    index of its kind in `blocks`. `required_vocab_size`: highest id of the tokenizer's added
    tokens, plus one. `added_rows`: rows that the setting `new_tokens` adds to the embeddings of the
    model's files; `vocab_size` includes them. `max_positions`: longest document in tokens that the
    position encoding supports. `rope_original_length`: length in tokens beyond which longrope and
    dynamic rope change their factors; None for other rope types. `separate_blocks`: number of
    blocks that keep the documents of a packed sequence separate; None if all do. `source`:
    publication of sizes that ship with this package; None if they were read from a model folder.
    """

    folder: str
    model_type: str
    dtype: str
    vocab_size: int
    is_tied: bool
    blocks: tuple[Block, ...]
    layer_kinds: tuple[int, ...]
    layers_name: str = "model.layers"
    embeddings_name: str = "model.embed_tokens"  # empty if their width is not hidden_size
    head_name: str = "lm_head"
    has_head_bias: bool = False
    has_composed_activation: bool = False  # computed by several PyTorch operators, not one kernel
    has_logit_softcap: bool = False
    has_score_softcap: bool = False  # soft-capped attention scores, which must be materialised
    quantization: str | None = None
    has_own_code: bool = False  # config.json names a class in the model's folder (remote code)
    required_vocab_size: int | None = None
    added_rows: int = 0
    max_positions: int | None = None
    rope_original_length: int | None = None
    dropouts: tuple[str, ...] = ()  # `key: value` of each dropout in config.json that is not 0
    has_router_loss: bool = False
    bidirectional_entry: str = ""  # entry of config.json that lets tokens attend to later tokens
    other_head: str = ""  # class of a checkpoint that has no language-model head
    has_other_towers: bool = False  # has linear layers outside decoder and head (vision tower)
    separate_blocks: int | None = None
    mixing_modules: tuple[str, ...] = ()  # classes that do not keep packed documents separate
    is_from_class: bool = False  # derived from the model's class, not computed by families.py
    other_parameters: int = 0  # outside blocks, embeddings, final norm and head
    largest_other: int = 0  # values of the largest of these parameters
    source: str | None = None

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layer_kinds)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden state."""
        return self.blocks[0].hidden_size

    @property
    def mixing_reason(self) -> str:
        """The reason why documents of a packed sequence would be mixed; empty if they are not."""
        if self.separate_blocks in (None, self.num_layers):
            return ""
        return (
            f"{self.separate_blocks} of {self.num_layers} blocks of this {self.model_type} model "
            "keep the documents of a packed sequence separate"
        )

    def counts(self, start: int = 0) -> list[tuple[Block, int]]:
        """Each kind of block with its number of layers, counted from layer `start` to the last."""
        kinds = self.layer_kinds[start:]
        return [(block, kinds.count(kind)) for kind, block in enumerate(self.blocks)]

    @cached_property
    def linear_parameters(self) -> int:
        """Weights and biases of all linear layers of all blocks."""
        return sum(count * block.linear_parameters for block, count in self.counts())

    @cached_property
    def quantised_parameters(self) -> int:
        """Parameters that a 4-bit or 8-bit base quantises: weights of the linear layers of blocks.

        Biases, embeddings, head, norms, routers and fused experts keep the training dtype
        (transformers 5.23: integrations/bitsandbytes.py quantises only nn.Linear, and
        quantizers/base.py leaves out the head). A weight that blocks share counts once.
        """
        linears = self.linears.values()
        return sum(each.weights for each in linears if each.is_quantised and not each.is_shared)

    @cached_property
    def expert_parameters(self) -> int:
        """Parameters of all experts of all blocks."""
        return sum(count * block.expert_parameters for block, count in self.counts())

    @property
    def num_experts(self) -> int:
        """The largest number of experts in a block; 0 for a dense model."""
        return max(block.num_experts for block in self.blocks)

    @property
    def largest_outside(self) -> int:
        """Values of the largest parameter outside blocks, which ZeRO-3 gathers as a whole."""
        return max(self.vocab_size * self.hidden_size, self.largest_other)

    @property
    def largest_linear(self) -> int:
        """Weights of the largest linear layer of a block."""
        return max(linear.weights for block in self.blocks for linear in block.linears)

    @cached_property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)
        embeddings += self.vocab_size * self.has_head_bias
        final_norm = self.hidden_size * (1 if self.blocks[0].norm_kind == "rms" else 2)
        blocks = sum(count * block.parameters for block, count in self.counts())
        return blocks + final_norm + embeddings + self.other_parameters

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """All linear layers except the head, by their full names in `named_modules()`."""
        return {
            f"{self.layers_name}.{layer}.{linear.name}": linear
            for layer, kind in enumerate(self.layer_kinds)
            for linear in self.blocks[kind].linears
        }

    @property
    def default_targets(self) -> list[str]:
        """The targets of `lora_target_modules: auto`: all linear layers of blocks except routers.

        Each target is the last part of a module's name, such as `q_proj`, because serving engines
        read only this form. A name is left out if one of its layers cannot be adapted. Fused
        experts are not linear layers; they are adapted only if the user names them.
        """
        linears = list(chain.from_iterable(block.linears for block in self.blocks))
        refused = {
            linear.last_part for linear in linears if not (linear.is_adaptable and linear.is_called)
        }
        names = [linear.last_part for linear in linears if not _ROUTER.match(linear.name)]
        return [name for name in dict.fromkeys(names) if name not in refused]

    def targeted(self, targets: str | Sequence[str]) -> list[tuple[str, Linear]]:
        """The linear layers that get an adapter, with their full names.

        `targets` is `auto` or a value of peft's `target_modules`: a list of last parts of dotted
        names, `all-linear`, or a regular expression for full names. The entry `experts` is skipped
        here (see `targeted_experts`). Raises UserError if an entry matches no layer.
        """
        targets = self.without_auto(targets)
        if targets == "all-linear":
            return [
                (name, linear)
                for name, linear in self.linears.items()
                if linear.is_adaptable and linear.is_called
            ]
        if isinstance(targets, str):
            selected = self.matching(targets, "lora_target_modules", is_pattern=True)
            self._require_match(selected, targets)
        else:
            self._require_match(targets, "[]")
            targets = [target for target in targets if target != EXPERTS]
            for target in targets:
                self._require_match(self.matching(target, "lora_target_modules"), target)
            selected = [
                name
                for name in self.linears
                if any(is_or_ends_with(name, target) for target in targets)
            ]
        if unadaptable := [name for name in selected if not self.linears[name].is_adaptable]:
            raise UserError(
                f"lora_target_modules: {targets!r} matches {unadaptable[0]}, but peft would not "
                "load the adapter of this layer: it adapts fused experts instead, or renames the "
                f"layer; these can be adapted: [{', '.join([*self.default_targets, EXPERTS])}]"
            )
        if uncalled := [name for name in selected if not self.linears[name].is_called]:
            raise UserError(
                f"lora_target_modules: {targets!r} matches {uncalled[0]}, a layer that its class "
                "does not call (it may read the weight), so an adapter would have no effect; these "
                "can be "
                f"adapted: [{', '.join(self.default_targets)}]"
            )
        return [(name, self.linears[name]) for name in selected]

    def targeted_experts(self, targets: str | Sequence[str]) -> list[tuple[str, ExpertTensor]]:
        """The fused expert tensors that get an adapter, with their full names.

        If `experts` is one of the targets, these are the tensors of all blocks, else none. Raises
        UserError if `experts` is a target and the model has no fused experts.
        """
        if EXPERTS not in ([targets] if isinstance(targets, str) else targets):
            return []
        tensors = [
            (f"{self.layers_name}.{layer}.{tensor.name}", tensor)
            for layer, kind in enumerate(self.layer_kinds)
            for tensor in self.blocks[kind].experts
        ]
        if not tensors:
            raise UserError(
                f"lora_target_modules: {EXPERTS} means fused experts, and {self.folder} has none; "
                f"its blocks have the linear layers {', '.join(self._linear_names)}"
            )
        return tensors

    def without_auto(self, targets: str | Sequence[str]) -> str | list[str]:
        """The targets, in which `auto` is replaced by `default_targets`, also within a list."""
        if targets in ("auto", EXPERTS):
            targets = [str(targets)]
        if isinstance(targets, str):
            return targets
        expanded = [self.default_targets if target == "auto" else [target] for target in targets]
        return list(dict.fromkeys(chain.from_iterable(expanded)))

    def kind_of(self, name: str) -> int:
        """Index in `blocks` of the kind of block that has the layer or tensor of this full name."""
        return self.layer_kinds[self.layer_of(name)]

    def layer_of(self, name: str) -> int:
        """Index of the block of the layer or tensor with this full name."""
        return int(name[len(self.layers_name) + 1 :].split(".", 1)[0])

    def matching(self, entry: str, setting: str, *, is_pattern: bool = False) -> list[str]:
        """Full names of the linear layers that end with `entry`, or that match it as a pattern.

        `setting`: the setting that error messages name.
        """
        if is_pattern:
            return full_matches(entry, self.linears, setting)
        return [name for name in self.linears if is_or_ends_with(name, entry)]

    @property
    def _linear_names(self) -> list[str]:
        return list(dict.fromkeys(linear.last_part for linear in self.linears.values()))

    def _require_match(self, matches: Sequence[str], target: str) -> None:
        """Raise UserError if a target matches nothing."""
        if matches:
            return
        names = ", ".join(self._linear_names)
        if self.num_experts and target.endswith(_EXPERT_NAMES):
            raise UserError(
                f"lora_target_modules: {target!r} of {self.folder}: the experts of a block are "
                f"fused into a few tensors, so their projections have no names; name {EXPERTS} to "
                f"adapt all of them, or linear layers: [{names}]"
            )
        raise UserError(
            f"lora_target_modules: {target!r} matches no linear layer of {self.folder}, whose "
            f"blocks have {names}; leave lora_target_modules out to adapt them all"
        )


def require_model_folder(model: Path) -> None:
    """Raise UserError if the model of a run file is not a folder."""
    if not model.is_dir():
        raise UserError(
            f"model: {model} is neither a folder nor a hub model in the local cache; download it "
            "with `hf download NAME`, or set model to FOLDER after `hf download NAME --local-dir "
            "FOLDER`"
        )


def read_shape(model: str, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of the model in a folder. Raises UserError if config.json cannot be used.

    `trust_remote_code`: run the model's own code if config.json names a class in it.
    """
    folder = Path(model)
    path = folder / "config.json"
    require_model_folder(folder)
    if not path.is_file():
        raise UserError(_message_without_config(folder))
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model: {folder} has a model and an adapter (adapter_config.json), and transformers "
            "would add the adapter to the model; move the adapter's files to another folder, and "
            "merge it or set init_adapter to use it"
        )
    config = require_json(path, "model: ")
    try:
        if trust_remote_code and _has_own_code(config):
            sizes = class_shape(folder, trust_remote_code=True)
            return _from_class(config, model, sizes)
        shape = shape_of(config, model)
        _require_pad_token(config, shape.vocab_size)
        return shape
    except KeyError as error:
        raise UserError(f"model: {path}: the key {error} is missing") from None
    except (UserError, TypeError, ValueError, ArithmeticError) as error:  # such as a wrong type
        raise UserError(f"model: {path}: {error}") from None


def shape_of(
    config: Config,
    model: str,
    *,
    class_sizes: Mapping[str, Any] | None = None,
    source: str | None = None,
) -> ModelShape:
    """Shape of the model with this config.json.

    `model`: its folder or name. `class_sizes`: sizes derived from the model's class, for a
    `model_type` that is not in families.py; if None, they are derived now (class_shape.py).
    """
    _require_plausible(config)
    if config["model_type"] in FAMILIES:
        shape = _from_family(config, model)
    else:
        shape = _from_class(config, model, class_sizes or class_shape(Path(model)))
    return replace(shape, source=source, other_head=other_head(config, is_tied=shape.is_tied))


def _from_family(config: Config, model: str) -> ModelShape:
    """The shape of a model whose type is in families.py."""
    family = FAMILIES[config["model_type"]]
    config = {**family.defaults, **config}
    require_window(config)
    blocks, layer_kinds = blocks_of_family(family, config)
    return ModelShape(
        vocab_size=positive_integer(config, "vocab_size"),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        blocks=blocks,
        layer_kinds=layer_kinds,
        layers_name=family.layers,
        embeddings_name=family.embeddings,
        head_name=family.head,
        has_head_bias=family.has_head_bias,
        has_composed_activation=config.get("hidden_act") == "gelu_new",
        **_common_fields(config, model),
    )


def _from_class(config: Config, model: str, sizes: Mapping[str, Any]) -> ModelShape:
    """The shape of a model whose sizes model/class_shape.py derived.

    For a multimodal model, these are the sizes of its language model.
    """
    unadaptable = sizes["rewritten_by_peft"]
    blocks = tuple(block_of_class(block, unadaptable) for block in sizes["blocks"])
    shape = ModelShape(
        vocab_size=sizes["vocab_size"],
        is_tied=sizes["is_tied"],
        blocks=blocks,
        layer_kinds=tuple(sizes["layer_kinds"]),
        layers_name=sizes["layers_name"],
        embeddings_name=sizes["embeddings_name"],
        head_name=sizes["head_name"],
        has_head_bias=sizes["has_head_bias"],
        has_other_towers=sizes["has_other_towers"],
        separate_blocks=sizes["separate_blocks"],
        mixing_modules=tuple(sizes.get("mixing_modules", ())),
        largest_other=sizes["largest_other"],
        is_from_class=True,
        **_common_fields({**config.get("text_config", {}), **config}, model),
    )
    return replace(shape, other_parameters=sizes["parameters"] - shape.parameters)


def _message_without_config(folder: Path) -> str:
    """Message about a folder without config.json, with what it has instead."""
    message = f"model: {folder} has no config.json, so it is not a model folder"
    if (folder / "adapter_config.json").is_file():
        return (
            f"{message} but an adapter (adapter_config.json); set model to the adapter's base, and "
            "init_adapter to this folder to continue training the adapter"
        )
    if gguf := sorted(path.name for path in folder.glob("*.gguf")):
        return (
            f"{message}; {gguf[0]} is a model in GGUF, which cannot be trained here: use the "
            "safetensors files of the model from which it was made"
        )
    return message


def _require_pad_token(config: Config, vocab_size: int) -> None:
    """Raise UserError if the padding token has no embedding, which no class can be built with."""
    pad_token = config.get("pad_token_id")
    if isinstance(pad_token, int) and not -vocab_size <= pad_token < vocab_size:
        raise UserError(
            f"pad_token_id: {pad_token}, but vocab_size is {vocab_size}; set pad_token_id to an id "
            "below it, such as that of eos_token_id"
        )


def _has_own_code(config: Config) -> bool:
    return "AutoModelForCausalLM" in (config.get("auto_map") or {})


def _common_fields(config: Config, model: str) -> dict[str, Any]:
    """The fields of ModelShape that are read from config.json in the same way for every type."""
    return {
        "folder": model,
        "model_type": config["model_type"],
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        "has_logit_softcap": config.get("final_logit_softcapping") is not None,
        "has_score_softcap": config.get("attn_logit_softcapping") is not None,
        "quantization": quantization_of(config)[0],
        "has_own_code": _has_own_code(config),
        "required_vocab_size": required_vocab_size(Path(model)),
        "max_positions": max_positions(config),
        "rope_original_length": rope_original_length(config),
        "dropouts": tuple(f"{key}: {config[key]}" for key in _DROPOUTS if config.get(key)),
        "has_router_loss": bool(config.get("output_router_logits")),
        "bidirectional_entry": bidirectional_entry(config),
    }


def quantization_of(config: Config) -> tuple[str | None, Mapping[str, Any]]:
    """The method of a checkpoint's quantisation, and its options; None if it has none."""
    configs = (config, config.get("text_config") or {})
    entries = [each.get("quantization_config") for each in configs]
    options: Any = next((entry for entry in entries if entry), {})
    if not isinstance(options, Mapping):
        raise UserError(f"quantization_config: expected an object, not {options!r}")
    return options.get("quant_method", "unknown") if options else None, options


def _require_plausible(config: Config) -> None:
    """Raise UserError for a size that no model has, because counting it would take too long."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _require_plausible(value)
        if not isinstance(value, int | float) or not _SIZE_KEY.search(key):
            continue
        limits = (limit for pattern, limit in _LARGEST_COUNTS if pattern.search(key))
        limit = next(limits, _LARGEST_SIZE)
        if value > limit:
            raise UserError(
                f"{key}: {reprlib.repr(value)} is more than any model has (at most {limit:,})"
            )


def is_or_ends_with(name: str, target: str) -> bool:
    """Whether a module's dotted name is `target` or ends with it, as in peft's target_modules."""
    return name == target or name.endswith(f".{target}")

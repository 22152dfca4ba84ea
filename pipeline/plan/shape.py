"""ModelShape: what config.json says of a model, without its weights. No torch.

The linear layers of a block are listed with the names that peft sees, so that adapters can be
counted and named before a model is loaded. tests/tensor/test_shape.py compares the counts with
transformers' and peft's own on the meta device.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.plan.tokens import count_tokens


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: `weight` is (d_out, d_in)."""

    name: str
    d_in: int
    d_out: int
    has_bias: bool = False

    @property
    def parameters(self) -> int:
        """Weight and bias."""
        return self.d_in * self.d_out + (self.d_out if self.has_bias else 0)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of equal blocks."""

    folder: str
    model_type: str
    dtype: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool
    linears: tuple[Linear, ...]
    norm_parameters: int  # of one block
    quantization: str | None = None
    num_tokens: int | None = None  # highest id of an added token of the tokenizer, plus one
    num_experts: int = 0

    @property
    def linear_parameters(self) -> int:
        """Parameters of all linear layers of all blocks: what 4 and 8 bits apply to."""
        return self.num_layers * sum(linear.parameters for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)
        norms = self.num_layers * self.norm_parameters + self.hidden_size
        return self.linear_parameters + norms + embeddings

    @cached_property
    def linear_names(self) -> tuple[str, ...]:
        """Full names of all linear layers but the head, as `named_modules()` gives them."""
        return tuple(
            f"model.layers.{layer}.{linear.name}"
            for layer in range(self.num_layers)
            for linear in self.linears
        )

    def targeted(self, targets: str | Sequence[str]) -> list[tuple[str, Linear]]:
        """Full name and kind of the linear layers, over all blocks, that are to be adapted.

        Selection is peft's: the end of a dotted name, `all-linear`, or a regular expression for
        the whole name. Raises UserError where an entry selects nothing, with what exists.
        """
        if isinstance(targets, str) and targets != "all-linear":
            hits = [name for name in self.linear_names if self._fullmatch(targets, name)]
            self._require(bool(hits), targets)
        elif targets == "all-linear":
            hits = list(self.linear_names)
        else:
            for target in targets:
                self._require(any(_ends(name, target) for name in self.linear_names), target)
            self._require(bool(targets), "[]")
            hits = [name for name in self.linear_names if any(_ends(name, t) for t in targets)]
        return [(name, self._by_name[name.split(".", 3)[3]]) for name in hits]

    @cached_property
    def _by_name(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.linears}

    def _fullmatch(self, pattern: str, name: str) -> bool:
        try:
            return re.fullmatch(pattern, name) is not None
        except re.error as error:
            raise UserError(
                f"lora_target_modules: {pattern!r} is no regular expression: {error}"
            ) from None

    def _require(self, is_found: bool, target: str) -> None:
        if not is_found:
            exist = ", ".join(linear.name.rsplit(".", 1)[-1] for linear in self.linears)
            raise UserError(
                f"lora_target_modules: {target!r} matches no linear layer of {self.folder}; "
                f"its blocks have {exist}"
            )


def read_shape(model: str) -> ModelShape:
    """Shape of the model folder `model`. Raises UserError if it is none or of an unknown kind."""
    folder = Path(model)
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(
            f"model: {model} is not a folder; bring a model from a hub with "
            "`hf download NAME --local-dir FOLDER` and give that folder"
        )
    if not path.is_file():
        raise UserError(f"model: {folder} holds no config.json, so it is not a model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"model: {path}: not readable as JSON: {error}") from None
    try:
        return _from_config(config, model)
    except KeyError as error:
        raise UserError(f"model: {path}: the key {error} is missing") from None


# Llama's block: four attention projections and a gated MLP, under the same names.
_BLOCKS_LIKE_LLAMA = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3",
}  # fmt: skip
_FUSED_LIKE_PHI3 = {"phi3"}


def _from_config(config: Mapping[str, Any], model: str) -> ModelShape:
    kind = str(config.get("model_type", "none"))
    if kind not in _BLOCKS_LIKE_LLAMA | _FUSED_LIKE_PHI3:
        known = ", ".join(sorted(_BLOCKS_LIKE_LLAMA | _FUSED_LIKE_PHI3))
        raise UserError(
            f"model: {model}: model_type {kind!r} cannot be planned yet; known: {known}"
        )
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    inner = int(config["intermediate_size"])
    build = _phi3_linears if kind in _FUSED_LIKE_PHI3 else _llama_linears
    quantization = config.get("quantization_config") or {}
    return ModelShape(
        folder=model,
        model_type=kind,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=int(config["vocab_size"]),
        # transformers leaves the key out where it has the class's default
        is_tied=bool(config.get("tie_word_embeddings", kind.startswith("gemma"))),
        linears=build(config, hidden, inner, heads * head_dim, kv_heads * head_dim),
        norm_parameters=_norm_parameters(kind, hidden, head_dim),
        quantization=quantization.get("quant_method"),
        num_tokens=count_tokens(Path(model)),
    )


def _llama_linears(
    config: Mapping[str, Any], hidden: int, inner: int, queries: int, keys: int
) -> tuple[Linear, ...]:
    attention = bool(config.get("attention_bias", False))
    is_qwen2 = config["model_type"] == "qwen2"  # biases on q, k and v, none on o
    mlp = bool(config.get("mlp_bias", False))
    return (
        Linear("self_attn.q_proj", hidden, queries, attention or is_qwen2),
        Linear("self_attn.k_proj", hidden, keys, attention or is_qwen2),
        Linear("self_attn.v_proj", hidden, keys, attention or is_qwen2),
        Linear("self_attn.o_proj", queries, hidden, attention),
        Linear("mlp.gate_proj", hidden, inner, mlp),
        Linear("mlp.up_proj", hidden, inner, mlp),
        Linear("mlp.down_proj", inner, hidden, mlp),
    )


def _phi3_linears(
    config: Mapping[str, Any], hidden: int, inner: int, queries: int, keys: int
) -> tuple[Linear, ...]:
    del config
    return (
        Linear("self_attn.qkv_proj", hidden, queries + 2 * keys),
        Linear("self_attn.o_proj", queries, hidden),
        Linear("mlp.gate_up_proj", hidden, 2 * inner),
        Linear("mlp.down_proj", inner, hidden),
    )


def _norm_parameters(kind: str, hidden: int, head_dim: int) -> int:
    norms = 4 if kind in ("gemma2", "gemma3_text") else 2
    on_heads = 2 * head_dim if kind in ("qwen3", "gemma3_text") else 0
    return norms * hidden + on_heads


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")

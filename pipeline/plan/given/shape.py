"""ModelShape: what config.json says of a model, without its weights. No torch.

The linear layers of a block are listed with the names that peft sees, so that adapters can be
counted and named before a model is loaded; families.py knows them. tests/plan/given/test_shape.py
compares the counts with transformers' and peft's own on the meta device.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.plan.given.families import FAMILIES, Linear, NormKind, Widths
from pipeline.plan.given.tokens import count_tokens

# How experts and their projections have been called, when they were still linear layers.
_EXPERT_NAMES = ("experts", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of equal blocks.

    `intermediate_size` is the inner width of the MLP that is made of linear layers: with experts
    that of the shared one, 0 if there is none. `expert_size` is the inner width of one expert.
    """

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
    layers_name: str = "model.layers"
    norm_kind: NormKind = "rms"
    num_block_norms: int = 2  # of full width
    has_head_norms: bool = False  # one for the queries of a head, one for its keys
    has_head_bias: bool = False  # of the output head
    is_gated: bool = True
    has_fused_gate: bool = False  # gate and up projection are one linear layer
    num_experts: int = 0  # 0: a dense model
    experts_per_token: int = 0
    expert_size: int = 0
    has_composed_activation: bool = False  # written out in Python, not one kernel
    logit_softcap: bool = False
    score_softcap: bool = False  # of attention scores, which then exist: no kernel fuses it
    quantization: str | None = None
    has_own_code: bool = False  # its folder brings a class that trust_remote_code would run
    num_tokens: int | None = None  # highest id of an added token of the tokenizer, plus one

    @property
    def linear_parameters(self) -> int:
        """Weights and biases of all linear layers of all blocks."""
        return self.num_layers * sum(linear.parameters for linear in self.linears)

    @property
    def quantised_parameters(self) -> int:
        """Weights that 4 and 8 bits apply to: of linear layers of blocks, without their biases.

        Embeddings, head, norms, routers and fused experts keep the training dtype (transformers
        5.23 integrations/bitsandbytes.py: nn.Linear alone; quantizers/base.py: not the head).
        """
        return self.num_layers * sum(linear.weights for linear in self.linears)

    @property
    def has_fused_attention(self) -> bool:
        """Whether one linear layer makes queries, keys and values."""
        return any(x.name.endswith(("qkv_proj", "query_key_value")) for x in self.linears)

    @property
    def expert_parameters(self) -> int:
        """All experts of all blocks: gate, up and down projection of each."""
        return self.num_layers * self.num_experts * self._parameters_of_an_expert

    @property
    def active_linear_parameters(self) -> int:
        """Weights of all blocks that one token is multiplied with, router and its experts too."""
        active = self._router_parameters + self.experts_per_token * self._parameters_of_an_expert
        return self.quantised_parameters + self.num_layers * active

    @property
    def norm_parameters(self) -> int:
        """Of one block."""
        full = self.num_block_norms * self.hidden_size
        return self._parameters_of_a_norm * (full + 2 * self.head_dim * self.has_head_norms)

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)
        embeddings += self.vocab_size * self.has_head_bias
        block = self.norm_parameters + self._router_parameters
        final_norm = self._parameters_of_a_norm * self.hidden_size
        experts = self.expert_parameters
        return self.linear_parameters + experts + self.num_layers * block + final_norm + embeddings

    @property
    def _parameters_of_a_norm(self) -> int:
        return 1 if self.norm_kind == "rms" else 2  # for each value of its width

    @property
    def _parameters_of_an_expert(self) -> int:
        return 3 * self.hidden_size * self.expert_size

    @property
    def _router_parameters(self) -> int:
        return self.num_experts * self.hidden_size

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Full names of all linear layers but the head, as `named_modules()` gives them."""
        return tuple(self._by_name)

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
        return [(name, self._by_name[name]) for name in hits]

    @cached_property
    def _by_name(self) -> dict[str, Linear]:
        return {
            f"{self.layers_name}.{layer}.{linear.name}": linear
            for layer in range(self.num_layers)
            for linear in self.linears
        }

    def _fullmatch(self, pattern: str, name: str) -> bool:
        try:
            return re.fullmatch(pattern, name) is not None
        except re.error as error:
            raise UserError(
                f"lora_target_modules: {pattern!r} is no regular expression: {error}"
            ) from None

    def _require(self, is_found: bool, target: str) -> None:
        if is_found:
            return
        exist = ", ".join(linear.name.rsplit(".", 1)[-1] for linear in self.linears)
        if self.num_experts and target.endswith(_EXPERT_NAMES):
            raise UserError(
                f"lora_target_modules: {target!r} of {self.folder}: the experts of a block are "
                "fused into one tensor, which cannot be adapted by name; what can be is "
                f"[{exist}], and lora_target_modules: all-linear takes these"
            )
        raise UserError(
            f"lora_target_modules: {target!r} matches no linear layer of {self.folder}; its blocks "
            f"have {exist}, and lora_target_modules: all-linear takes them all"
        )


def require_model_folder(model: Path) -> None:
    """Raise UserError where the model of a run file is not there."""
    if not model.is_dir():
        raise UserError(
            f"model: {model} is not a folder, nor a hub model in the local cache; bring one with "
            "`hf download NAME`, or `hf download NAME --local-dir FOLDER` and give that folder"
        )


def read_shape(model: str) -> ModelShape:
    """Shape of the model folder `model`. Raises UserError if it is none or of an unknown kind."""
    folder = Path(model)
    path = folder / "config.json"
    require_model_folder(folder)
    if not path.is_file():
        raise UserError(f"model: {folder} holds no config.json, so it is not a model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"model: {path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"model: {path}: expected a block in braces")
    try:
        return _from_config(config, model)
    except KeyError as error:
        raise UserError(f"model: {path}: the key {error} is missing") from None
    except (UserError, TypeError, ValueError) as error:  # the others: int() of what is no number
        raise UserError(f"model: {path}: {error}") from None


def _from_config(found: Mapping[str, Any], model: str) -> ModelShape:
    kind = str(found.get("model_type", "none"))
    family = FAMILIES.get(kind)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model_type {kind!r} cannot be planned yet; known: {known}")
    config = {**family.defaults, **found}
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    inner = 0 if family.inner_key is None else _count(config, family.inner_key)
    widths = Widths(hidden=hidden, inner=inner, queries=heads * head_dim, keys=kv_heads * head_dim)
    experts = family.experts(config) if family.experts else None
    quantization = config.get("quantization_config") or {}
    return ModelShape(
        folder=model,
        model_type=kind,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=_count(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_count(config, "vocab_size"),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        linears=family.linears(config, widths),
        layers_name=family.layers,
        norm_kind=family.norm_kind,
        num_block_norms=family.num_block_norms,
        has_head_norms=family.head_norms(config),
        has_head_bias=family.has_head_bias,
        is_gated=family.is_gated,
        has_fused_gate=family.has_fused_gate,
        num_experts=experts.count if experts else 0,
        experts_per_token=experts.per_token if experts else 0,
        expert_size=experts.size if experts else 0,
        has_composed_activation=config.get("hidden_act") == "gelu_new",
        logit_softcap=config.get("final_logit_softcapping") is not None,
        score_softcap=config.get("attn_logit_softcapping") is not None,
        quantization=quantization.get("quant_method"),
        has_own_code="AutoModelForCausalLM" in (config.get("auto_map") or {}),
        num_tokens=count_tokens(Path(model)),
    )


def _count(config: Mapping[str, Any], key: str) -> int:
    """A whole number above 0. Raises KeyError, or UserError for anything else."""
    value = config[key]
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{key}: expected a whole number above 0; found {value!r}")
    return value


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")

"""Checks that this package trains a model class correctly: loss, attention, packing and adapter.

Results of this package are compared with results of transformers and peft, on a small copy of the
model (small_copy.py), in fp32 on the CPU. If the class is trained correctly, they differ by a
relative error below 1e-5. For 84 kinds of models every incorrect result differed by more than 1e-3.
The results of all checks of a class are its *proof*.

    python -m pipeline.model.proof MODEL_FOLDER NAME ... [--trust-remote-code]

runs the checks for adapters on the linear layers with these names, and prints the results.
plan/given/class_proof.py runs this command for a `model_type` that is not in the table
plan/given/families.py.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.errors import UserError
from pipeline.model.attention import (
    WITHIN_DOCUMENTS,
    document_arguments,
    require_separate_documents,
)
from pipeline.model.base import auto_class, load_plain, model_config
from pipeline.model.checkpoint_names import model_on_meta, stored_names
from pipeline.model.expert_slices import expert_slices
from pipeline.model.joint_lora import join_lora
from pipeline.model.loss import IGNORED, SummedLoss
from pipeline.model.quantised_files import checkpoint_files
from pipeline.model.small_copy import random_model, small_copies
from pipeline.model.structure import blocks, expert_tensors, text_decoder
from pipeline.plan.given.class_proof import (
    LIMIT,
    Proof,
    adapted_names,
    proof_file,
)
from pipeline.plan.given.shape import EXPERTS
from pipeline.plan.given.torch_process import cached_result
from pipeline.plan.plan import Plan

_COPIES = 3  # in memory at once: the model, a copy with an adapter, a copy loaded from files
_LENGTH = 24  # tokens of a row
# Lengths in tokens of the documents in each of the two packed rows; the rest of a row is padding.
_DOCUMENTS = ((7, 12, 3), (20, 1, 2))
_ONE_DOCUMENT_PER_ROW = ((_LENGTH,), (_LENGTH,))


def prove(folder: Path, targets: Sequence[str], *, trust_remote_code: bool = False) -> Proof:
    """The proof of a model's class, from the cache if possible.

    `targets`: last parts of the names of the adapted layers. The checks take a few seconds.
    """
    path = proof_file(folder, targets, trust_remote_code=trust_remote_code)
    return Proof(
        **cached_result(
            path, lambda: asdict(_proof_of(folder, targets, trust_remote_code=trust_remote_code))
        )
    )


def require_proof(plan: Plan) -> Proof:
    """The proof of a plan's model class; rank 0 calls this before it loads the base.

    Raises UserError if the proof shows that the run would train incorrectly.
    """
    settings = plan.settings
    names = adapted_names(plan.shape, settings)
    proof = prove(settings.model_folder, names, trust_remote_code=settings.trust_remote_code)
    plan.with_proof(proof)  # called only for its UserError
    return proof


def _proof_of(folder: Path, targets: Sequence[str], *, trust_remote_code: bool) -> Proof:
    """The proof of the class of the model in a folder, without the cache."""
    model = _model_to_check(folder, trust_remote_code=trust_remote_code)
    missing = _missing_names(folder, targets, trust_remote_code=trust_remote_code)
    return replace(prove_model(model, targets), without_merge=missing)


def _model_to_check(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """A small copy of the model, else the model itself. Raises UserError if neither runs here."""
    config = model_config(folder, trust_remote_code=trust_remote_code)
    auto = auto_class(folder, trust_remote_code)
    try:
        return small_model(auto, config, trust_remote_code=trust_remote_code)
    except UserError as error:
        entries = [entry for file in checkpoint_files(folder) for entry in file.entries.values()]
        needed = _COPIES * 4 * sum(math.prod(entry.shape) for entry in entries)  # in fp32
        if needed > psutil.virtual_memory().available:
            raise UserError(
                f"{error}; checks of the model itself need {needed / 2**30:.0f} GiB of host memory"
            ) from None
        return load_plain(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)


def small_model(auto: Any, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The first small copy whose forward pass runs. Raises UserError if none does."""
    problem: Exception | None = None
    for small in small_copies(config):
        try:
            model = random_model(auto, small, **options)
            _set_attention(model, "eager")
            with torch.no_grad():
                model(input_ids=_ids(model), use_cache=False)
        except Exception as error:  # noqa: BLE001 - a class may raise anything at reduced sizes
            problem = error
        else:
            return model
    raise UserError(f"no small copy of this class runs: {type(problem).__name__}: {problem}")


def prove_model(model: PreTrainedModel, targets: Sequence[str]) -> Proof:
    """Run all checks on a model in fp32 on the CPU, without changing its weights."""
    errors: dict[str, float] = {}
    refusals: list[str] = []
    without_packs: list[str] = []
    without_reentrant: list[str] = []
    without_fast_paths: list[str] = []

    def check(name: str, reasons: list[str], measure: Callable[[], float]) -> None:
        try:
            errors[name] = measure()
        except UserError as error:
            reasons.append(str(error).removesuffix("; set packing: false"))
        except Exception as error:  # noqa: BLE001 - a class may raise anything
            reasons.append(f"{name}: {type(error).__name__}: {error}")
        else:
            if not errors[name] <= LIMIT:
                reasons.append(f"{name} differs by {errors[name]:.1e} (at most {LIMIT:.0e})")

    check("loss", refusals, lambda: _loss_error(model))
    check("attention", refusals, lambda: _attention_error(model))
    check("packs", without_packs, lambda: _packs_error(model))
    check("other documents", without_packs, lambda: _leak_error(model))
    was_compared = "packs" in errors
    if was_compared and without_packs and (names := mixing_classes(model)):
        without_packs[0] += f": {', '.join(names)} reads other documents of a packed sequence"
    check("adapter", refusals, lambda: _adapter_error(model, targets))
    check(
        "checkpointing", refusals, lambda: _checkpointing_error(model, targets, is_reentrant=False)
    )
    check(
        "re-entrant checkpointing",
        without_reentrant,
        lambda: _checkpointing_error(model, targets, is_reentrant=True),
    )
    check("fast paths", without_fast_paths, lambda: _fast_paths_error(model, targets))
    return Proof(
        errors=errors,
        refusals=refusals,
        without_packs=list(dict.fromkeys(without_packs)),
        without_reentrant=without_reentrant,
        without_fast_paths=without_fast_paths,
    )


@torch.no_grad()
def _loss_error(model: PreTrainedModel) -> float:
    """Relative difference between SummedLoss, in one and in three chunks, and the class's loss."""
    ids, labels = _ids(model), _labels(model)
    _set_attention(model, "eager")
    expected = float(model(input_ids=ids, labels=labels, use_cache=False).loss)
    _set_attention(model, WITHIN_DOCUMENTS)
    num_supervised = int((labels[:, 1:] != IGNORED).sum())
    errors = []
    for num_chunks in (1, 3):
        loss_sum = float(SummedLoss(model, num_chunks)(ids, labels, _ONE_DOCUMENT_PER_ROW))
        errors.append(abs(loss_sum / num_supervised - expected) / abs(expected))
    return max(errors)


def _set_attention(model: Any, name: str) -> None:
    """Switch the attention function. Raises ValueError if the class ignores it silently."""
    model.set_attn_implementation(name)
    if model.config.get_text_config(decoder=True)._attn_implementation != name:
        raise ValueError(f"{type(model).__name__} does not take the attention function {name}")


@torch.no_grad()
def _attention_error(model: PreTrainedModel) -> float:
    """Relative difference between the logits of WITHIN_DOCUMENTS and of eager attention.

    The sequence is longer than the sliding window and the attention chunk of the small copy.
    """
    _set_attention(model, "eager")
    expected = model(input_ids=_ids(model), use_cache=False).logits
    _set_attention(model, WITHIN_DOCUMENTS)
    return _relative_error(model(input_ids=_ids(model), use_cache=False).logits, expected)


@torch.no_grad()
def _packs_error(model: PreTrainedModel) -> float:
    """Largest relative difference between a document's hidden states in a pack and alone."""
    ids, decoder = _ids(model), text_decoder(model)
    packed = _packed_states(model, ids)
    errors = []
    for row, span in _spans():
        alone = decoder(input_ids=ids[row : row + 1, span], use_cache=False).last_hidden_state[0]
        errors.append(_relative_error(packed[row, span], alone))
    return max(errors)


@torch.no_grad()
def _leak_error(model: PreTrainedModel) -> float:
    """Largest change of a document's hidden states when another document of its pack changes."""
    ids = _ids(model)
    before, worst = _packed_states(model, ids), 0.0
    for row, span in _spans():
        changed = ids.clone()
        changed[row, span] = _ids(model, seed=2)[row, span]
        difference = (_packed_states(model, changed) - before).abs()
        for other_row, other_span in _spans():
            if other_row == row and other_span != span:
                worst = max(worst, float(difference[other_row, other_span].max()))
    return worst


@torch.no_grad()
def mixing_classes(model: PreTrainedModel) -> list[str]:
    """Classes of the modules through which a document reads other documents of its pack.

    If the first document of a pack changes, the second one's output of such a module changes too,
    although its input to the module does not. Of modules inside each other, the inner one is named.
    """
    (row, first), (_, second) = _spans()[:2]
    ids = _ids(model)
    changed = ids.clone()
    changed[row, first] = _ids(model, seed=2)[row, first]
    before, after = (_states_by_module(model, each, row, second) for each in (ids, changed))
    mixing = {
        module
        for module, (module_input, output) in before.items()
        if module in after
        and torch.equal(module_input, after[module][0])
        and _relative_error(after[module][1], output) > LIMIT
    }
    inner = (module for module in mixing if not mixing & {*module.modules()} - {module})
    return sorted({type(module).__name__ for module in inner})


def _states_by_module(
    model: Any, ids: torch.Tensor, row: int, span: slice
) -> dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of the modules inside the blocks, at some tokens of packed rows.

    Modules are left out whose first tensor and output do not have the shape (B, T, width).
    """
    states: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        pair = (*tensors[:1], out[0] if isinstance(out, tuple) else out)
        if len(pair) == 2 and all(t.dim() == 3 and t.shape[:2] == ids.shape for t in pair):
            states[module] = (pair[0][row, span].clone(), pair[1][row, span].clone())

    modules = [inner for block in blocks(model) for inner in block.modules() if inner is not block]
    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        _packed_states(model, ids)
    except UserError:
        pass  # blocks without a receiver; the states are complete
    finally:
        for handle in handles:
            handle.remove()
    return states


def _packed_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of rows that are packed with the documents of _DOCUMENTS."""
    _set_attention(model, WITHIN_DOCUMENTS)
    arguments = document_arguments(WITHIN_DOCUMENTS, _DOCUMENTS, ids)
    states: torch.Tensor = text_decoder(model)(
        input_ids=ids, use_cache=False, **arguments
    ).last_hidden_state
    require_separate_documents(arguments["documents"], blocks(model), model.config.model_type)
    return states


def _adapter_error(model: PreTrainedModel, targets: Sequence[str]) -> float:
    """Relative difference of the logits after the adapter was saved and loaded with plain peft.

    Raises UserError if a matrix of the adapter gets no gradient, or a frozen weight gets one.
    """
    base = copy.deepcopy(model)
    adapted = _adapted(model, targets)
    _backward(adapted)
    named = dict(adapted.named_parameters())
    if trained := [n for n, p in named.items() if "lora_" not in n and p.grad is not None]:
        raise UserError(f"a frozen weight got a gradient: {trained[0]}")
    lora = {name: p for name, p in named.items() if "lora_" in name}
    # A and B of each layer and of each expert tensor
    num_expected = 2 * (len(target_names(model, targets)) + len(target_experts(model, targets)))
    if len(lora) != num_expected:
        raise UserError(f"peft adapted {len(lora)} matrices instead of {num_expected}")
    if unreached := [n for n, p in lora.items() if p.grad is None or not p.grad.any()]:
        raise UserError(
            f"no gradient reaches {len(unreached)} of {len(lora)} adapter matrices, the first is "
            f"{unreached[0]}; leave its layer out of lora_target_modules"
        )
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        adapted.eval()
        expected_logits = adapted(input_ids=_ids(model), use_cache=False).logits
        adapted.save_pretrained(folder, save_embedding_layers=False)
        base.set_attn_implementation(WITHIN_DOCUMENTS)
        loaded = PeftModel.from_pretrained(base, folder).eval()
        logits = loaded(input_ids=_ids(model), use_cache=False).logits
        return _relative_error(logits, expected_logits)


def _checkpointing_error(
    model: PreTrainedModel, targets: Sequence[str], *, is_reentrant: bool
) -> float:
    """Relative difference between the gradients with and without activation checkpointing."""
    adapted = _adapted(model, targets)
    expected = _backward(adapted)
    causal: Any = adapted.get_base_model()
    if is_reentrant:
        _require_single_calls(causal)
    causal.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_(True)
    )
    causal.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    return _relative_error(_backward(adapted), expected)


@torch.no_grad()
def _require_single_calls(model: PreTrainedModel) -> None:
    """Raise UserError if a forward pass calls a block several times (HRM).

    Each re-entrant backward pass of a block then adds to the same gradients, and at ZeRO-3
    DeepSpeed expects one such addition (0.19.8 runtime/zero/stage3.py:1626).
    """
    calls: Counter[nn.Module] = Counter()
    handles = [
        layer.register_forward_pre_hook(lambda module, _: calls.update([module]))
        for layer in blocks(model)
    ]
    model(input_ids=_ids(model), use_cache=False)
    for handle in handles:
        handle.remove()
    if (most := max(calls.values())) > 1:
        raise UserError(f"a forward pass calls a block {most} times")


def _fast_paths_error(model: PreTrainedModel, targets: Sequence[str]) -> float:
    """Relative difference between the gradients with and without the fast paths."""
    adapted = _adapted(model, targets)
    expected = _backward(adapted)
    join_lora(adapted)
    return _relative_error(
        _backward(adapted, SummedLoss(adapted, 3, has_gradient_in_forward=True)), expected
    )


def _adapted(model: PreTrainedModel, targets: Sequence[str]) -> PeftModel:
    """A copy of the model with an adapter whose matrices are random, lora_B included."""
    config = LoraConfig(
        r=4,
        target_modules=target_names(model, targets),
        target_parameters=target_experts(model, targets) or None,
        task_type="CAUSAL_LM",
    )
    base = copy.deepcopy(model)
    base.set_attn_implementation(WITHIN_DOCUMENTS)
    adapted = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    return adapted


def _backward(adapted: PeftModel, loss: SummedLoss | None = None) -> torch.Tensor:
    """The gradients of all adapter matrices after one backward pass, as one vector."""
    adapted.train().zero_grad()
    torch.manual_seed(0)
    loss = SummedLoss(adapted, 1) if loss is None else loss
    loss(_ids(adapted), _labels(adapted), _ONE_DOCUMENT_PER_ROW).backward()
    parameters = sorted(adapted.named_parameters())
    gradients = [p.grad.flatten() for _, p in parameters if p.grad is not None]
    return torch.cat(gradients) if gradients else torch.zeros(1)


def target_names(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Full names of the linear layers of the text decoder that end with one of the targets."""
    inside = set(text_decoder(model).modules())
    ends = tuple(f".{target}" for target in targets if target != EXPERTS)
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module in inside and name.endswith(ends)
    ]
    if ends and not names:
        raise UserError(f"no linear layer of the text decoder is named {', '.join(targets)}")
    return names


def target_experts(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Full names of the fused expert tensors of the text decoder, if `experts` is a target."""
    if EXPERTS not in targets:
        return []
    decoder = text_decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return [f"{prefix}.{name}" for name in expert_tensors(decoder)]


def _missing_names(folder: Path, targets: Sequence[str], *, trust_remote_code: bool) -> list[str]:
    """Reasons why an adapter on these targets cannot be merged into the base; empty if it can.

    To merge it, each adapted weight must be a tensor of the checkpoint, or, for experts, consist of
    such tensors.
    """
    model = model_on_meta(folder, trust_remote_code=trust_remote_code)
    files = checkpoint_files(folder)
    shapes = {key: entry.shape for file in files for key, entry in file.entries.items()}
    stored = stored_names(model, shapes)
    names = [f"{name}.weight" for name in target_names(model, targets)]
    missing = [name for name in names if name not in stored or stored[name].converter is not None]
    for name in target_experts(model, targets):
        try:
            expert_slices(model, name, stored[name], shapes)
        except (KeyError, UserError):
            missing.append(name)
    if not missing:
        return []
    return [
        f"{len(missing)} adapted weights are not tensors of the checkpoint, the first is "
        f"{missing[0]}: the adapter loads with peft, but cannot be merged"
    ]


def _ids(model: Any, seed: int = 1) -> torch.Tensor:
    """Random token ids, without the ids of special tokens such as an image placeholder."""
    generator = torch.Generator().manual_seed(seed)
    entries = model.config.to_dict().items()
    special = {value for key, value in entries if "token" in key and type(value) is int}
    vocab_size = model.config.get_text_config().vocab_size
    usable = torch.tensor([i for i in range(vocab_size) if i not in special])
    return usable[torch.randint(len(usable), (2, _LENGTH), generator=generator)]


def _labels(model: Any) -> torch.Tensor:
    """Labels for `_ids(model)`, without the first five tokens of each row."""
    labels = _ids(model)
    labels[:, :5] = IGNORED
    return labels


def _spans() -> list[tuple[int, slice]]:
    """Row and positions of every document in the packed rows."""
    spans = []
    for row, lengths in enumerate(_DOCUMENTS):
        start = 0
        for length in lengths:
            spans.append((row, slice(start, start + length)))
            start += length
    return spans


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def main() -> None:
    """Check the class of the model in a folder, and print the results as JSON."""
    parser = argparse.ArgumentParser(description="check a model class on a small copy of the model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    proof = _proof_of(args.folder, args.names, trust_remote_code=args.trust_remote_code)
    sys.stdout.write(json.dumps(asdict(proof)) + "\n")


if __name__ == "__main__":
    main()

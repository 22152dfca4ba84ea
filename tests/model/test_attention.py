"""Documents of a pack do not attend to each other; each has the logits that it has alone."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers import modeling_flash_attention_utils as flash

from pipeline.model.attention import FLASH, WITHIN_DOCUMENTS, document_arguments
from pipeline.model.base import load_base, load_plain
from tests.messages import assert_mentions
from tests.plan.given.test_shape import EXPERTS, QWEN_EXPERTS, SMALL, WITHOUT_HEAD_DIM
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor

WINDOW = {"sliding_window": 5}
# For classes that use a window only from layer `max_window_layers`.
IN_WINDOWS = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
# model_type, and changes of the config SMALL
FAMILIES = [
    ("llama", {}),
    ("mistral", {}),
    ("mistral", WINDOW),
    ("qwen2", {}),
    ("qwen2", IN_WINDOWS),
    ("qwen3", {}),
    ("qwen3", IN_WINDOWS),
    ("gemma", {}),
    ("gemma2", WINDOW),
    ("gemma3_text", WINDOW),
    ("smollm3", {"num_hidden_layers": 4}),  # the fourth layer has no positions
    ("smollm3", IN_WINDOWS | {"num_hidden_layers": 4}),
    ("phi3", {}),
    ("phi3", WINDOW),
    ("phi", {}),
    ("gpt_neox", {}),
    ("mixtral", EXPERTS),
    ("mixtral", EXPERTS | WINDOW),
    ("qwen2_moe", QWEN_EXPERTS | IN_WINDOWS | {"shared_expert_intermediate_size": 56}),
    ("qwen3_moe", QWEN_EXPERTS),
]
LENGTH = 24  # tokens of a pack
PACKS = ((7, 12, 3), (20, 1, 2))  # tokens of each document in two packs, which end with padding


def is_dense(family):
    """Whether a family has no experts: rounding in experts depends on the other tokens."""
    return not family[1].keys() & EXPERTS.keys()


def make(folder, kind, change, dtype="float32", spread=0.2):
    """The folder, with a random model; `spread`: standard deviation of its weights.

    The default is so large that attention is sharp and each attended token matters.
    """
    keys = SMALL | change
    if kind in WITHOUT_HEAD_DIM:
        keys.pop("head_dim")
    config = AutoConfig.for_model(kind, initializer_range=spread, **keys)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def load(folder, attention=WITHIN_DOCUMENTS, dtype="float32"):
    return load_plain(folder, dtype=getattr(torch, dtype), attention=attention).eval()


def make_ids(seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (2, LENGTH), generator=generator).to(device)


def logits(model, ids, documents=PACKS):
    """The logits of packs, each document of which attends only to itself."""
    arguments = document_arguments(model.config._attn_implementation, documents, ids)
    return model(ids, **arguments).logits


def spans(documents=PACKS):
    """Row and positions of each document of the packs."""
    for row, lengths in enumerate(documents):
        start = 0
        for length in lengths:
            yield row, slice(start, start + length)
            start += length


@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), FAMILIES)
def test_a_document_of_a_pack_has_the_logits_that_it_has_alone(tmp_path, kind, change):
    folder = make(tmp_path, kind, change)
    assert_alone(load(folder), load(folder, "eager"), 1e-4)


def assert_alone(model, plain, tolerance):
    """Assert that `model` on packs has the logits of `plain` on each document alone."""
    ids = make_ids(device=model.device)
    packed = logits(model, ids)
    for row, span in spans():
        alone = plain(ids[row : row + 1, span]).logits[0]
        assert torch.allclose(packed[row, span], alone, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "change"), filter(is_dense, FAMILIES))
def test_no_document_of_a_pack_affects_another(tmp_path, kind, change, dtype):
    assert_nothing_leaks(load(make(tmp_path, kind, change, dtype), dtype=dtype))


@torch.no_grad()
@pytest.mark.parametrize(("bits", "spread"), [("load_in_4bit", 0.2), ("load_in_8bit", 0.05)])
def test_no_document_of_a_pack_affects_another_with_a_quantised_base(tmp_path, bits, spread):
    """With 8 bits, `spread` keeps the activations below 6.

    If one activation in a column exceeds 6, LLM.int8 computes the column in 16 bits for all rows.
    So a large activation in one document would change the results of the others.
    """
    folder = make(tmp_path, "llama", {}, "bfloat16", spread)
    plan = make_plan(folder, bf16=True, lora_target_modules="all-linear", **{bits: True})
    assert_nothing_leaks(load_base(plan, torch.device("cpu")).eval())


def assert_nothing_leaks(model):
    """Change each document in turn: only its own logits change, all others are bitwise equal."""
    ids, other = make_ids(device=model.device), make_ids(1, model.device)
    before = logits(model, ids)
    for changed, span in spans():
        ids_now = ids.clone()
        ids_now[changed, span] = other[changed, span]
        after = logits(model, ids_now)
        for row, other_span in spans():
            is_equal = torch.equal(before[row, other_span], after[row, other_span])
            assert is_equal == ((row, other_span) != (changed, span))


@pytest.mark.parametrize(("kind", "change"), FAMILIES)
def test_no_gradient_flows_from_one_document_to_another(tmp_path, kind, change):
    model, ids = load(make(tmp_path, kind, change)), make_ids()
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    arguments = document_arguments(WITHIN_DOCUMENTS, PACKS, ids)
    outputs = model(inputs_embeds=inputs, **arguments).logits
    for row, span in spans():
        [gradient] = torch.autograd.grad(outputs[row, span].sum(), inputs, retain_graph=True)
        assert gradient[row, span].any()
        gradient[row, span] = 0
        assert not gradient.any()


@pytest.mark.parametrize("is_reentrant", [True, False])
@pytest.mark.parametrize(("kind", "change"), [("llama", {}), ("gemma2", WINDOW)])
def test_checkpointing_does_not_change_the_gradients_of_packs(tmp_path, kind, change, is_reentrant):
    model, ids = load(make(tmp_path, kind, change)).train(), make_ids()

    def gradient():
        model.zero_grad()
        logits(model, ids).square().mean().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    plain = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    assert torch.equal(gradient(), plain)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), FAMILIES)
def test_padded_prompts_have_the_answers_of_eager_attention(tmp_path, kind, change):
    folder = make(tmp_path, kind, change)
    prompts = make_ids()
    mask = torch.ones_like(prompts)
    mask[1, :9] = 0
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    answers = [
        load(folder, attention).generate(prompts, attention_mask=mask, generation_config=config)
        for attention in (WITHIN_DOCUMENTS, "eager")
    ]
    assert torch.equal(*answers)


def test_rows_of_one_document_need_no_arguments():
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert document_arguments(WITHIN_DOCUMENTS, ((5,), (3,)), ids) == {}
    assert document_arguments("eager", ((5,), (3,)), ids) == {}


def test_positions_restart_at_each_document_and_padding_is_separate():
    ids = torch.zeros(2, 5, dtype=torch.long)
    arguments = document_arguments(FLASH, ((2, 3), (3, 1)), ids)
    assert arguments["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]
    for side in "qk":
        assert arguments[f"cu_seq_lens_{side}"].tolist() == [0, 2, 5, 8, 9, 10]
        assert arguments[f"max_length_{side}"] == 3


def test_positions_for_a_gpu_are_copied_from_pinned_memory(monkeypatch):
    """A copy from other memory would make the host wait. Functions of torch replace the GPU."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: x)
    ids = SimpleNamespace(shape=(1, 5), device=torch.device("cuda"))
    for name, keys in ((WITHIN_DOCUMENTS, ["position_ids"]), (FLASH, ["cu_seq_lens_q"])):
        pinned.clear()
        arguments = document_arguments(name, ((2, 3),), ids)
        assert all(any(arguments[key] is tensor for tensor in pinned) for key in keys)


def test_an_attention_implementation_that_crosses_documents_is_refused():
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is asserted
        document_arguments("sdpa", ((2, 3),), torch.zeros(1, 5, dtype=torch.long))
    assert_mentions(error.value, "sdpa")


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """flash_attn_varlen_func as flash-attn 2.8 documents it; q, k, v: tokens, heads, head size."""
    assert causal
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    outputs = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        query, key, value = (x[start:end].transpose(0, 1) for x in (q, k, v))
        queries_per_key = len(query) // len(key)  # heads
        key, value = (x.repeat_interleave(queries_per_key, 0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        max_distance = window_size[0] if window_size[0] >= 0 else end - start
        scores = scores.masked_fill((distance < 0) | (distance > max_distance), float("-inf"))
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), [("llama", {}), ("gemma2", WINDOW), ("phi3", WINDOW)])
def test_flash_attention_gets_the_bounds_of_documents(tmp_path, monkeypatch, kind, change):
    """The package is replaced by `varlen`, which transformers calls with the same arguments."""
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (None, varlen, None, None, None))
    folder = make(tmp_path, kind, change)
    model = load(folder, "eager")
    model.config._attn_implementation = FLASH
    assert_alone(model, load(folder, "eager"), 1e-4)
    assert_nothing_leaks(model)

"""Documents of a pack never see each other, and each is attended to as if it were alone."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers import modeling_flash_attention_utils as flash

from pipeline.model.attention import FLASH, WITHIN_DOCUMENTS, arguments_for
from pipeline.model.base import load_base, load_plain
from tests.plan.given.test_shape import EXPERTS, QWEN_EXPERTS, SMALL, WITHOUT_HEAD_DIM
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor

WINDOW = {"sliding_window": 5}
IN_WINDOWS = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
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
    ("smollm3", {"num_hidden_layers": 4}),  # the fourth has no positions
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
PACKS = ((7, 12, 3), (20, 1, 2))  # of 24 tokens, the last of which are padding
LENGTH = 24


def is_dense(family):
    """Whether a family has no experts, whose sums depend by rounding on who else is there."""
    return not family[1].keys() & EXPERTS.keys()


def make(folder, kind, change, dtype="float32", spread=0.2):
    """A folder with a random model whose attention is sharp enough to show what it sees."""
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
    return model(ids, **arguments_for(model.config._attn_implementation, documents, ids)).logits


def places(documents=PACKS):
    """Row and positions of each document."""
    for row, lengths in enumerate(documents):
        start = 0
        for length in lengths:
            yield row, slice(start, start + length)
            start += length


@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), FAMILIES)
def test_a_document_in_a_pack_is_as_if_it_were_alone(tmp_path, kind, change):
    folder = make(tmp_path, kind, change)
    assert_alone(load(folder), load(folder, "eager"), 1e-4)


def assert_alone(model, plain, tolerance):
    """In packs, `model` gives what `plain` gives for each document alone."""
    ids = make_ids(device=model.device)
    packed = logits(model, ids)
    for row, place in places():
        alone = plain(ids[row : row + 1, place]).logits[0]
        assert torch.allclose(packed[row, place], alone, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "change"), filter(is_dense, FAMILIES))
def test_nothing_leaks_from_one_document_to_another(tmp_path, kind, change, dtype):
    assert_nothing_leaks(load(make(tmp_path, kind, change, dtype), dtype=dtype))


@torch.no_grad()
@pytest.mark.parametrize(("bits", "spread"), [("load_in_4bit", 0.2), ("load_in_8bit", 0.05)])
def test_nothing_leaks_through_a_quantised_base(tmp_path, bits, spread):
    """In 8 bits none of the activations may reach 6, beyond which LLM.int8 rounds for all alike."""
    folder = make(tmp_path, "llama", {}, "bfloat16", spread)
    plan = make_plan(folder, bf16=True, lora_target_modules="all-linear", **{bits: True})
    assert_nothing_leaks(load_base(plan, torch.device("cpu")).eval())


def assert_nothing_leaks(model):
    """Each document in turn is changed: its own logits change, all others' not by a bit."""
    ids, other = make_ids(device=model.device), make_ids(1, model.device)
    before = logits(model, ids)
    for changed, place in places():
        ids_now = ids.clone()
        ids_now[changed, place] = other[changed, place]
        after = logits(model, ids_now)
        for row, there in places():
            is_same = torch.equal(before[row, there], after[row, there])
            assert is_same == ((row, there) != (changed, place))


@pytest.mark.parametrize(("kind", "change"), FAMILIES)
def test_no_gradient_flows_from_one_document_to_another(tmp_path, kind, change):
    model, ids = load(make(tmp_path, kind, change)), make_ids()
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    arguments = arguments_for(WITHIN_DOCUMENTS, PACKS, ids)
    found = model(inputs_embeds=inputs, **arguments).logits
    for row, place in places():
        [gradient] = torch.autograd.grad(found[row, place].sum(), inputs, retain_graph=True)
        assert gradient[row, place].any()
        gradient[row, place] = 0
        assert not gradient.any()


@pytest.mark.parametrize("is_reentrant", [True, False])
@pytest.mark.parametrize(("kind", "change"), [("llama", {}), ("gemma2", WINDOW)])
def test_recomputed_blocks_see_the_same_documents(tmp_path, kind, change, is_reentrant):
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
def test_padded_prompts_are_answered_as_with_pytorch_s_attention(tmp_path, kind, change):
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


def test_rows_of_one_document_need_nothing():
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert arguments_for(WITHIN_DOCUMENTS, ((5,), (3,)), ids) == {}
    assert arguments_for("eager", ((5,), (3,)), ids) == {}


def test_positions_restart_and_padding_is_apart():
    ids = torch.zeros(2, 5, dtype=torch.long)
    found = arguments_for(FLASH, ((2, 3), (3, 1)), ids)
    assert found["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]
    for side in "qk":
        assert found[f"cu_seq_lens_{side}"].tolist() == [0, 2, 5, 8, 9, 10]
        assert found[f"max_length_{side}"] == 3


def test_attention_that_looks_across_documents_is_refused():
    with pytest.raises(ValueError, match="sdpa"):
        arguments_for("sdpa", ((2, 3),), torch.zeros(1, 5, dtype=torch.long))


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """What flash_attn_varlen_func of flash-attn 2.8 says it does: (tokens, heads, width)."""
    assert causal
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    found = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        query, key, value = (x[start:end].transpose(0, 1) for x in (q, k, v))
        groups = len(query) // len(key)
        key, value = (x.repeat_interleave(groups, 0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        away = torch.arange(end - start)[:, None] - torch.arange(end - start)
        reach = window_size[0] if window_size[0] >= 0 else end - start
        scores = scores.masked_fill((away < 0) | (away > reach), float("-inf"))
        found.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), [("llama", {}), ("gemma2", WINDOW), ("phi3", WINDOW)])
def test_flash_attention_is_told_where_documents_end(tmp_path, monkeypatch, kind, change):
    """The package is not here: what transformers would call it with is computed plainly."""
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (None, varlen, None, None, None))
    folder = make(tmp_path, kind, change)
    model = load(folder, "eager")
    model.config._attn_implementation = FLASH
    assert_alone(model, load(folder, "eager"), 1e-4)
    assert_nothing_leaks(model)

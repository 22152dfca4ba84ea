"""Model families other than Llama train, and their adapters load in peft and merge."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.adapter.gather import gather_weights
from pipeline.adapter.publish import publish_adapter
from pipeline.model.adapter import attach_adapter
from pipeline.model.base import load_base
from pipeline.model.fingerprint import base_fingerprint
from pipeline.train.engine import Engine
from tests.adapter.merged import merge_adapter, tensors
from tests.ranks import run_ranks
from tests.tiny import CONFIG, Documents, make_plan, make_tokenizer
from tests.train_tiny import batches_of_step, distance

pytestmark = pytest.mark.engine

IDS = torch.arange(3, 35).reshape(2, 16)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "phi": {},
    "gpt_neox": {},
    "mixtral": EXPERTS,
    "qwen3_moe": QWEN_EXPERTS | {"head_dim": 8},
    "qwen2_moe": QWEN_EXPERTS | {"shared_expert_intermediate_size": 40},
    # layers of two kinds: the first has no experts
    "qwen3_moe-mixed": QWEN_EXPERTS | {"head_dim": 8, "mlp_only_layers": [0]},
    "qwen2_moe-mixed": QWEN_EXPERTS
    | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
}
EXPERTS_RUN = {"batch_size": 2, "lora_target_modules": "all-linear"}
MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe", "qwen3_moe-mixed", "qwen2_moe-mixed"]


def make_family(folder, kind, dtype="float32"):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind.removesuffix("-mixed"),
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,
        **CONFIG,
        **FAMILIES[kind],
    )
    AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_and_gather(session, folder, settings, leaf_modules=None):
    """A list of losses and gradient norms of two steps, the fp32 weights, and the logits with them.

    `leaf_modules`: a replacement for the `leaf_module` of DeepSpeed's config.
    """
    plan = make_plan(folder, session.placement.world_size, 40, **settings)
    if leaf_modules is not None:
        zero = plan.deepspeed["zero_optimization"] | {"leaf_module": leaf_modules}
        plan = replace(plan, deepspeed=plan.deepspeed | {"zero_optimization": zero})
    engine = Engine(attach_adapter(load_base(plan, session.device), plan), plan)
    split, losses = Documents(), []
    for step in range(2):
        batches, supervised = batches_of_step(plan, split, step, session.placement.rank)
        result = engine.optimizer_step(batches, supervised, 4e-3)
        losses.append(session.sum_over_ranks([result.loss_sum])[0] / supervised)
        losses.append(result.grad_norm)
    weights = gather_weights(engine.parameters, keep=session.is_rank_zero)
    engine.deepspeed.eval()
    with torch.no_grad():  # on every rank: at ZeRO-3 a forward pass is collective
        logits = engine.deepspeed.module.model(input_ids=IDS).logits
    return losses, weights, logits


def publish(weights, plan, folder, out):
    publish_adapter(plan, weights, out, step=2, base=base_fingerprint(folder))
    return out


def load(folder, adapter=None):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (base if adapter is None else PeftModel.from_pretrained(base, adapter)).eval()


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread, like every rank: several threads would sum the experts in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """The model folder of a kind in a dtype, made once."""

    @cache
    def make(kind, dtype="float32"):
        return make_family(tmp_path_factory.mktemp("family") / "model", kind, dtype)

    return make


# ZeRO-3 gathers a leaf module as a whole, so that ranks which route tokens to different experts
# call the same collectives.
LEAF_MODULES = {"of the plan": None, "none": {"classes": []}}
# Changed settings of a run on two ranks, and the leaf modules with which it is repeated at ZeRO-3.
CHANGES = {kind: [({}, (*LEAF_MODULES,))] for kind in MIXTURES}
CHANGES["mixtral"] += [
    ({"gradient_checkpointing": True}, ("of the plan",)),
    ({"load_in_4bit": True, "gradient_checkpointing": True}, ("of the plan",)),
]


def train_replicated_and_sharded(session, folder, changes):
    """For each change: the run at ZeRO-2, and those at ZeRO-3 by the name of their leaf modules."""
    results = []
    for change, names in changes:
        settings = EXPERTS_RUN | change
        replicated = train_and_gather(session, folder, settings | {"zero_stage": 2})
        sharded = {
            name: train_and_gather(
                session, folder, settings | {"zero_stage": 3}, LEAF_MODULES[name]
            )
            for name in names
        }
        results.append((replicated, sharded))
    return results


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_published_and_the_merged_adapter_have_the_trained_logits(family, tmp_path, kind):
    folder = family(kind)
    settings = {"zero_stage": 2, "batch_size": 2, "lora_target_modules": "all-linear"}
    arguments = (train_and_gather, folder, settings)
    ((_, weights, logits),) = run_ranks(*arguments, tmp_path=tmp_path, world_size=1)
    plan = make_plan(folder, 1, 40, **settings)
    adapter = publish(weights, plan, folder, tmp_path / "adapter")
    adapted = load(folder, adapter)
    assert sum("lora_" in name for name, _ in adapted.named_parameters()) == len(weights)
    # The run multiplies in another order, which rounds differently on some CPUs.
    assert (logits_of(adapted) - logits).norm() < 1e-6 * logits.norm()
    untrained = logits_of(load(folder))
    assert (untrained - logits).norm() > 0.02 * logits.norm()
    merge_adapter(folder, adapter, tmp_path / "merged")
    merged = logits_of(load(tmp_path / "merged"))
    assert (merged - logits).norm() < 1e-5 * logits.norm()
    by_peft = tmp_path / "by_peft"
    adapted.merge_and_unload().save_pretrained(by_peft)
    expected, ours = tensors(by_peft), tensors(tmp_path / "merged")
    assert ours.keys() == expected.keys() == tensors(folder).keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


@pytest.mark.parametrize("kind", MIXTURES)
def test_sharded_experts_give_the_losses_of_replicated_ones(family, tmp_path, kind):
    """Ranks route tokens to different experts; ZeRO-3 must neither hang nor differ."""
    arguments = (train_replicated_and_sharded, family(kind), CHANGES[kind])
    for replicated, sharded in run_ranks(*arguments, tmp_path=tmp_path)[0]:
        expected_losses, expected_weights, _ = replicated
        for name, (losses, weights, _) in sharded.items():
            assert losses == pytest.approx(expected_losses, rel=1e-6), name
            assert distance(weights, expected_weights) < 1e-5, name


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_published_adapter_of_a_sharded_mixture_in_bf16_has_the_trained_logits(
    family, tmp_path, kind
):
    folder = family(kind, "bfloat16")
    settings = {"zero_stage": 3, "batch_size": 2, "bf16": True, "lora_target_modules": "all-linear",
                "fast_paths": False}  # fmt: skip
    _, weights, logits = run_ranks(train_and_gather, folder, settings, tmp_path=tmp_path)[0]
    plan = make_plan(folder, 2, 40, **settings)
    adapter = publish(weights, plan, folder, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).eval()
    assert torch.equal(logits_of(adapted), logits)

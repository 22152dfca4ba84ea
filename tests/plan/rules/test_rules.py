"""Every rule of the table applies in its case, and not in the closest case without its problem."""

import json
from dataclasses import replace

import pytest

from pipeline.config.settings import RunSettings
from pipeline.plan.deepspeed.config import deepspeed_config
from pipeline.plan.deepspeed.overlay import overlay
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import make_plan
from pipeline.plan.render import plan_overview, plan_text
from pipeline.plan.rules.model import INPUT_RULES
from pipeline.plan.rules.rule import PlanContext, installed_versions
from pipeline.plan.rules.table import RULES
from tests.messages import assert_mentions, refused
from tests.plan.rules.quiet_cases import ALTERNATIVE_CASES, ORDINARY_RUNS, QUIET_CASES
from tests.plan.rules.rule_cases import CASES, LONGROPE, OTHER_CASES, SHORT
from tests.plans import CPU, LLAMA_8B, SMOLLM2, gpu, sized, with_blocks

pytestmark = pytest.mark.unit


@pytest.fixture
def context(tmp_path):
    """Function that makes the input of a rule: Llama 8B on 8 GPUs at ZeRO-2 in bf16, with changes.

    `layout` and `shape` have changed fields, `packages` versions. `own` is the user's DeepSpeed
    JSON. Other keys are settings.
    """

    def make(
        config=LLAMA_8B, hardware=None, layout=(), own=None, shape=(), packages=(), data=None,
        proof=None,
        **settings,
    ) -> PlanContext:  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        values = {"model": str(tmp_path), "train_data": "t", "output_dir": "o"} | settings
        run = RunSettings.model_validate(values)
        chosen_layout = Layout(**{
            "zero_stage": 2, "micro_batch_size": 1, "accumulation_steps": 1,
            "checkpointed_layers": 0, "nodes": 1, "ranks_per_node": 8,
            "training_dtype": "bfloat16", **dict(layout),
        })  # fmt: skip
        model = with_blocks(read_shape(str(tmp_path)), **dict(shape))
        hardware = hardware or gpu()
        config = deepspeed_config(model, run, chosen_layout, is_cuda=hardware.kind == "cuda")
        if own is not None:
            (tmp_path / "ds.json").write_text(json.dumps(own))
            config = overlay(config, str(tmp_path / "ds.json"))
        return PlanContext(
            settings=run, shape=model, hardware=hardware, layout=chosen_layout, deepspeed=config,
            packages=dict(installed_versions()) | dict(packages), data=data, proof=proof,
        )  # fmt: skip

    return make


BY_ID = {rule.id: rule for rule in RULES}


def test_every_rule_has_its_cases():
    assert len(BY_ID) == len(RULES)
    assert CASES.keys() == BY_ID.keys()


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_applies_in_its_case_and_not_in_the_most_similar_case_without_the_problem(
    context, rule
):
    case, similar_case = CASES[rule]
    assert BY_ID[rule].check(context(**case))
    assert not BY_ID[rule].check(context(**similar_case))


@pytest.mark.parametrize(("rule", "case"), [*OTHER_CASES, *ALTERNATIVE_CASES])
def test_a_rule_applies_for_each_of_its_keys(context, rule, case):
    assert BY_ID[rule].check(context(**case))


@pytest.mark.parametrize(("rule", "case"), QUIET_CASES)
def test_a_rule_does_not_apply_without_one_of_its_conditions(context, rule, case):
    assert not BY_ID[rule].check(context(**case))


@pytest.mark.parametrize("name", ORDINARY_RUNS)
def test_no_rule_applies_to_an_ordinary_run(context, name):
    """Except the rules that are listed with the run."""
    case, rules = ORDINARY_RUNS[name]
    run = context(**{"lora_r": 16} | case)
    assert {rule.id for rule in RULES if rule.check(run)} == rules


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_has_a_reason_a_remedy_and_a_source(rule):
    for text in (rule.reason, rule.remedy, rule.source):
        assert text
        assert not text.endswith(".")
        assert "|" not in text  # a column of docs/rules.md


def test_rules_that_are_checked_before_a_layout_is_chosen_only_refuse():
    assert {rule.level for rule in INPUT_RULES} == {"refuse"}


@pytest.fixture
def plan(tmp_path):
    """Function that plans a run of the model with this config; `files`: name -> JSON content."""

    def make(config=LLAMA_8B, hardware=None, ranks=8, files=(), **settings):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name, content in dict(files).items():
            (tmp_path / name).write_text(json.dumps(content))
        values = {"model": str(tmp_path), "train_data": "t", "output_dir": "o"} | settings
        run = RunSettings.model_validate(values)
        hardware = hardware or gpu()
        return make_plan(run, read_shape(run.model), hardware, nodes=1, ranks_per_node=ranks)

    return make


@pytest.mark.parametrize(
    ("run", "rule"),
    [
        ({"load_in_8bit": True, "zero_stage": 3}, "8bit-zero3"),
        ({"hardware": CPU, "fp16": True}, "fp16-cpu"),
        ({"config": SMOLLM2, "lora_target_modules": ["lm_head"]}, "tied-pair"),
    ],
)
def test_a_rule_refuses_a_plan_before_any_other_check(plan, run, rule):
    with refused(f"rule {rule}"):
        plan(**run)


def test_a_package_version_with_a_known_defect_is_refused(plan, monkeypatch):
    versions = dict(installed_versions()) | {"deepspeed": "0.18.0"}
    monkeypatch.setattr("pipeline.plan.plan.installed_versions", lambda: versions)
    with refused("rule deepspeed-wrong-gradients"):
        plan(zero_stage=2)


def test_a_plan_has_advice_on_the_amount_of_data_only_if_the_amount_is_known(plan):
    def advice(of_plan):
        return [rule.id for rule in of_plan.rules if rule.level == "advise"]

    def warnings(of_plan):
        return [rule.id for rule in of_plan.rules if rule.level == "warn"]

    new_plan = plan(lora_r=16)  # a larger r would get advice on an option of vLLM
    small, large = new_plan.with_data(sized(500)), new_plan.with_data(sized(50_000))
    assert advice(new_plan) == advice(large) == []
    assert advice(small) == ["data-small"]
    assert set(warnings(small)) - set(warnings(large)) == {"few-steps"}
    assert "few-steps" in plan_overview(small)  # what the start of a run logs
    assert "`preset: small`" in plan_text(small)
    assert small.settings == new_plan.settings


# The embeddings of Llama 8B have 128256 rows, so that a token with id 128256 has no embedding.
TEXT_TOKEN = {"128000": {"content": "<bos>"}, "128256": {"content": "<mine>"}}
IMAGE_TOKEN = {"128256": {"content": "<image>"}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": TEXT_TOKEN}),
        ("added_tokens.json", {"<mine>": 128256}),
        ("tokenizer.json", {"added_tokens": [{"id": 128256, "content": "<mine>"}]}),
    ],
)
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(plan, name, content):
    with refused("rule tokens-without-embeddings"):
        plan(files={name: content})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"128255": {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": IMAGE_TOKEN, "image_token": "<image>"}),
        ("tokenizer.json", {"added_tokens": [], "model": 1}),
        ("tokenizer_config.json", []),
    ],
)
def test_a_tokenizer_whose_text_tokens_have_embeddings_is_accepted(plan, name, content):
    assert plan(files={name: content})


@pytest.mark.parametrize(
    ("auto_class", "has_own_code"), [("AutoModelForCausalLM", True), ("AutoConfig", False)]
)
def test_a_model_class_in_the_model_folder_is_detected(tmp_path, auto_class, has_own_code):
    config = LLAMA_8B | {"auto_map": {auto_class: "own.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(str(tmp_path)).has_own_code is has_own_code


def test_a_rule_about_long_documents_refuses_once_they_are_counted(plan):
    """Only prepared data has the length of the longest document.

    A LongRoPE model changes its frequencies beyond 4096 tokens, for all documents of a micro-batch.
    """
    new_plan = plan(LONGROPE, max_length=8192)
    assert "rope-original-length-uncounted" in [rule.id for rule in new_plan.rules]
    with refused("rule rope-original-length", 5000, 4096, "packing: false", "batch_size: 1"):
        new_plan.with_data(sized(9, longest=5000))
    one_document_per_micro_batch = plan(LONGROPE, max_length=8192, packing=False, batch_size=1)
    assert one_document_per_micro_batch.with_data(sized(9, longest=5000)).schedule


def test_the_message_has_the_number_of_documents_beyond_the_positions_of_the_model(plan):
    """3 of the 9 documents are longer than the 4096 positions."""
    data = replace(sized(9, longest=5000), count_longer=lambda tokens: 3 if tokens == 4096 else 0)
    new_plan = plan(SHORT, max_length=8192).with_data(data)
    (rule,) = [rule for rule in new_plan.rules if rule.id == "beyond-positions"]
    assert_mentions(rule.message, "3 of 9", 5000, 4096, "max_length")

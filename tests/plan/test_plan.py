"""The plan: choices, batch arithmetic, steps, refusals, and the run files of launch/runs."""

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from docs.run_files import plan_of, planned_run_files
from pipeline.config.load import load_settings
from pipeline.config.settings import RunSettings
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import make_plan
from pipeline.plan.render import plan_json, plan_overview, plan_text
from tests import ROOT
from tests.messages import assert_mentions, refused
from tests.plans import CPU, LLAMA_8B, SMOLLM2, gpu, sized

pytestmark = pytest.mark.unit


@pytest.fixture
def plan(tmp_path):
    """Function that plans a run of the model with this config.json; default: 8 GPUs of 80 GiB."""

    def make(config=LLAMA_8B, hardware=None, ranks=8, nodes=1, **settings):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        values = {"model": str(folder), "train_data": "t", "output_dir": "o", "packing": False}
        values |= settings
        run = RunSettings.model_validate(values)
        hardware = hardware or gpu(80)
        return make_plan(run, read_shape(run.model), hardware, nodes=nodes, ranks_per_node=ranks)

    return make


def test_parameter_counts_equal_the_published_numbers(plan):
    assert plan().shape.parameters == 8_030_261_248  # model card of Llama 3.1 8B: 8.03 B
    assert plan(SMOLLM2).shape.parameters == 134_515_008  # model card of SmolLM2-135M: 135 M


def test_an_adapter_has_lora_r_times_input_plus_output_width_parameters_per_linear_layer(plan):
    widths = {"attention": 2 * (4096 + 4096) + 2 * (4096 + 1024), "mlp": 3 * (4096 + 14336)}
    assert plan(lora_r=64).trainable == 32 * 64 * sum(widths.values())


@pytest.mark.parametrize(
    ("batch_settings", "ranks", "micro_batch_and_accumulation"),
    [
        ({"global_batch_size": 64}, 8, (8, 1)),
        ({"global_batch_size": 64, "batch_size": 2}, 8, (2, 4)),
        ({"global_batch_size": 24, "gradient_accumulation_steps": 3}, 4, (2, 3)),
        ({"batch_size": 2, "gradient_accumulation_steps": 4}, 8, (2, 4)),
        ({"batch_size": 3}, 2, (3, 1)),
        ({"gradient_accumulation_steps": 5}, 2, (1, 5)),
        ({}, 1, (16, 1)),
        ({}, 64, (1, 1)),
    ],
)
def test_the_global_batch_is_micro_batch_times_accumulation_times_ranks(
    plan, batch_settings, ranks, micro_batch_and_accumulation
):
    layout = plan(SMOLLM2, ranks=ranks, max_length=256, **batch_settings).layout
    micro_batch, accumulation_steps = micro_batch_and_accumulation
    assert (layout.micro_batch_size, layout.accumulation_steps) == micro_batch_and_accumulation
    product = micro_batch * accumulation_steps * ranks
    assert layout.global_batch_size == product
    assert batch_settings.get("global_batch_size", product) == product


@pytest.mark.parametrize(
    ("batch_settings", "nearest_possible"),
    [
        ({"global_batch_size": 12}, "8 or 16"),
        ({"global_batch_size": 40, "batch_size": 2}, "32 or 48"),
        ({"global_batch_size": 32, "batch_size": 2, "gradient_accumulation_steps": 4}, "64"),
        ({"global_batch_size": 4}, "8 or 16"),
    ],
)
def test_a_global_batch_that_8_ranks_cannot_divide_is_refused_with_the_nearest_possible(
    plan, batch_settings, nearest_possible
):
    with refused("global_batch_size", nearest_possible):
        plan(**batch_settings)


def schedule_of(documents, epochs, batch):
    """Total steps, steps per epoch and warm-up steps of a run on one rank."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMOLLM2))
        run = RunSettings(
            model=folder, train_data="t", output_dir="o", packing=False, epochs=epochs,
            global_batch_size=batch,
        )  # fmt: skip
        new_plan = make_plan(run, read_shape(folder), CPU, nodes=1, ranks_per_node=1)
        return new_plan.with_data(sized(documents)).steps


@given(
    documents=st.integers(1, 100_000), epochs=st.integers(1, 4), batch=st.sampled_from([1, 8, 56])
)
def test_the_steps_of_each_epoch_cover_every_document_once(documents, epochs, batch):
    schedule = schedule_of(documents, epochs, batch)
    assert schedule.total_steps == schedule.steps_per_epoch * epochs
    unused_places_in_last_step = schedule.steps_per_epoch * batch - documents
    assert 0 <= unused_places_in_last_step < batch
    assert 1 <= schedule.warmup_steps <= schedule.total_steps


def test_an_epoch_has_a_step_for_each_global_batch_of_sequences(plan):
    """Prepared data has a known number of sequences; in an estimate, packs are assumed full."""
    estimated = replace(sized(1000, mean=100), is_exact=False)
    prepared = replace(sized(1000, mean=100), sequences=203)
    new_plan = plan(global_batch_size=8, max_length=500)
    assert new_plan.with_data(estimated).steps.steps_per_epoch == 1000 / 8
    assert new_plan.with_data(prepared).steps.steps_per_epoch == 26  # 203 / 8, rounded up
    packed = replace(new_plan, settings=new_plan.settings.model_copy(update={"packing": True}))
    full_packs = 1000 * 100 / 500
    assert packed.with_data(estimated).steps.steps_per_epoch == full_packs / 8
    assert packed.with_data(prepared).steps.steps_per_epoch == 26


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_learning_rate_starts_above_zero_and_never_rises_after_the_warm_up(plan, kind):
    new_plan = plan(lr=1e-3, lr_scheduler_type=kind, warmup_ratio=0.1, min_lr_ratio=0.1,
                global_batch_size=8).with_data(sized(800))  # fmt: skip
    rates = [new_plan.learning_rate(step) for step in range(100)]  # 800 documents / 8
    last_warmup_step = 9  # 10 of 100 steps
    assert rates[0] == pytest.approx(1e-3 / 10)
    assert max(rates) == rates[last_warmup_step] == pytest.approx(1e-3)
    after_warmup = itertools.pairwise(rates[last_warmup_step:])
    assert all(earlier >= later for earlier, later in after_warmup)
    rounding_error = 1e-12
    assert min(rates) >= 0.1 * 1e-3 - rounding_error


def test_the_training_dtype_depends_on_the_gpu_and_the_settings(plan):
    assert plan(hardware=gpu(80, capability=(7, 5))).training_dtype == "float16"
    assert plan().training_dtype == "bfloat16"
    assert plan(bf16=False, fp16=False, lora_r=8).training_dtype == "float32"


@pytest.mark.parametrize(
    ("targets", "facts"),
    [
        (["q_proj", "k_porj"], ["k_porj", "q_proj, k_proj"]),
        (["c_attn"], ["c_attn", "q_proj, k_proj"]),
        (".*nothing.*", [".*nothing.*", "q_proj, k_proj"]),
        ("(", ["regular expression"]),
        ([], ["[]", "q_proj, k_proj"]),
    ],
)
def test_lora_targets_that_match_no_layer_are_refused_with_the_names_of_the_layers(
    plan, targets, facts
):
    with refused("lora_target_modules", *facts):
        plan(lora_target_modules=targets)


@pytest.mark.parametrize(
    ("config_change", "layer_names"),
    [
        ({}, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ({"model_type": "phi3"}, "qkv_proj o_proj gate_up_proj down_proj"),
        (
            {"model_type": "gpt_neox", "num_key_value_heads": 32},
            "query_key_value dense dense_h_to_4h dense_4h_to_h",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
            "q_proj k_proj v_proj o_proj",
        ),
        (
            {"model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 2}
            | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
            "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        ),
    ],
)
def test_auto_targets_are_the_linear_layers_of_the_blocks_except_routers_and_routed_experts(
    plan, config_change, layer_names
):
    new_plan = plan(LLAMA_8B | config_change)
    assert new_plan.settings.lora_target_modules == layer_names.split()
    assert_mentions(new_plan.why["lora_target_modules"], *layer_names.split())
    assert_mentions(plan_text(new_plan), "lora_target_modules", layer_names.replace(" ", ", "))
    # A plan with the resulting list as a setting, as for a resumed run, is the same.
    plan_of_the_list = make_plan(
        new_plan.settings, new_plan.shape, new_plan.hardware, nodes=1, ranks_per_node=8
    )
    assert plan_of_the_list.trainable == new_plan.trainable
    assert "lora_target_modules" not in plan_of_the_list.why


def test_a_regular_expression_selects_the_same_layers_as_their_names(plan):
    all_linear = plan(lora_target_modules="all-linear").trainable
    assert all_linear == plan().trainable
    by_pattern = plan(lora_target_modules=r".*\.self_attn\.[qv]_proj").trainable
    by_names = plan(lora_target_modules=["q_proj", "v_proj"]).trainable
    assert by_pattern == by_names < all_linear


@pytest.mark.parametrize(
    ("files", "facts"),
    [
        ({}, []),
        ({"config.json": "{"}, ["JSON"]),
        ({"config.json": "[1]"}, ["JSON object"]),
        ({"config.json": json.dumps(SMOLLM2 | {"hidden_size": "big"})}, ["hidden_size", "big"]),
        ({"config.json": json.dumps(SMOLLM2 | {"num_attention_heads": 0})}, ["above 0"]),
        ({"config.json": json.dumps(SMOLLM2 | {"head_dim": "x"})}, ["x"]),
        ({"config.json": '{"model_type": "llama"}'}, ["num_hidden_layers", "missing"]),
        ({"config.json": "{}"}, ["model_type", "missing"]),
        (
            {"config.json": json.dumps(SMOLLM2 | {"layer_types": ["sliding_attention"]}
             | {"model_type": "qwen2", "sliding_window": 4096})},
            ["layer_types", "sliding_attention", "use_sliding_window"],
        ),
    ],
)  # fmt: skip
def test_a_folder_without_a_valid_model_config_is_refused(tmp_path, files, facts):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with refused("model", "config.json", *facts):
        read_shape(str(tmp_path))


def test_a_missing_hub_model_is_refused_with_the_download_command():
    with refused("meta-llama/Llama-3.1-8B", "hf download"):
        read_shape("meta-llama/Llama-3.1-8B")


def test_the_deepspeed_config_has_the_values_of_the_plan(plan):
    new_plan = plan(zero_stage=3, batch_size=2, gradient_accumulation_steps=4, max_grad_norm=0.0)
    config = new_plan.deepspeed
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.0  # without the key DeepSpeed clips at 1
    assert config["optimizer"]["params"]["torch_adam"] is True
    zero = config["zero_optimization"]
    assert zero["stage"] == 3
    # Every adapter matrix is below the threshold: at most lora_r x intermediate_size elements.
    assert zero["stage3_param_persistence_threshold"] == 64 * 14336
    assert zero["reduce_bucket_size"] <= 2**24  # elements
    assert "auto" not in json.dumps(config)


def test_only_zero_2_and_3_set_the_dtype_of_accumulated_gradients(plan):
    """At stage 1 the key grad_accum_dtype makes DeepSpeed use another optimizer class."""
    assert "data_types" not in plan(zero_stage=1).deepspeed
    assert plan(zero_stage=2).deepspeed["data_types"] == {"grad_accum_dtype": "fp32"}


def test_the_plan_can_be_dumped_as_json_and_shown_as_text(plan):
    new_plan = plan(global_batch_size=64).with_data(sized(1000))
    data = json.loads(json.dumps(plan_json(new_plan)))
    assert data["model"]["trainable"] == new_plan.trainable
    assert data["memory"]["peak_bytes"] == sum(data["memory"]["per_rank"].values())
    num_steps = "16 (16 an epoch)"  # 1000 documents in batches of 64
    assert_mentions(plan_text(new_plan), "ZeRO-2", "bfloat16", "global batch 64", num_steps)


def test_a_start_says_in_four_lines_what_will_run(plan):  # the fifth is the data that were read
    overview = plan_overview(plan(global_batch_size=64).with_data(sized(20_000)))
    first_words = [line.split()[0] for line in overview.splitlines()]
    assert first_words == ["model", "run", "steps", "memory"]


RUN_FILES = planned_run_files()


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_no_rule_advises_another_setting_for_a_shipped_run_file_on_its_machine(path):
    shipped_plan = plan_of(path)
    advice = {rule.id for rule in shipped_plan.rules if rule.level == "advise"}
    assert advice <= {"vllm-max-lora-rank"}  # advice on an option of vLLM, not on a setting
    text = path.read_text(encoding="utf-8")
    assert f"launch/runs/{path.name}" in text  # the command in the first comment of the file


def test_no_rule_applies_to_the_quickstart(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    settings = load_settings(ROOT / "launch/runs/quickstart.yaml", [f"model={tmp_path}"])
    shipped_plan = make_plan(settings, read_shape(str(tmp_path)), CPU, nodes=1, ranks_per_node=2)
    assert shipped_plan.rules == ()

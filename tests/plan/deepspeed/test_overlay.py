"""A user's DeepSpeed JSON: values that it sets, the merge, and refusals with line numbers."""

import json

import pytest

from pipeline.config.settings import RunSettings
from pipeline.plan.deepspeed.keys import (
    BLOCKS,
    FLAGS,
    REMOVED,
    REMOVED_FROM_ZERO,
    SHORT_NAMES,
    TOP_LEVEL,
    WHOLE_NUMBERS,
    ZERO_OPTIMIZATION,
)
from pipeline.plan.deepspeed.overlay import overlay, with_json_constraints
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import make_plan
from tests.commands import Command
from tests.messages import refused
from tests.plans import SMOLLM2, gpu, sized

pytestmark = pytest.mark.unit

# A ZeRO-3 config for the Trainer of transformers.
TRAINER_JSON = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"device": "none", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.fixture
def write(tmp_path):
    def to_file(content) -> str:
        path = tmp_path / "ds.json"
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return to_file


@pytest.fixture
def plan(tmp_path, write):
    def make(content, **settings):
        (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
        values = {
            "model": str(tmp_path), "train_data": "t", "output_dir": "o",
            "deepspeed_json": write(content),
        }  # fmt: skip
        run = RunSettings.model_validate(values | settings)
        return make_plan(run, read_shape(str(tmp_path)), gpu(), nodes=1, ranks_per_node=8)

    return make


def settings_of(**keys) -> RunSettings:
    return RunSettings(model="m", train_data="t", output_dir="o", **keys)


def test_a_config_of_the_trainer_is_accepted(plan):
    new_plan = plan(TRAINER_JSON)
    zero = new_plan.deepspeed["zero_optimization"]
    assert new_plan.layout.zero_stage == 3
    assert zero["sub_group_size"] == 1e9
    assert new_plan.deepspeed["steps_per_print"] == 2000
    assert new_plan.deepspeed["optimizer"]["params"]["betas"] == [0.9, 0.999]
    assert "auto" not in json.dumps(new_plan.deepspeed)
    # with a stage3_max_live_parameters of 1e9, all of this base stays gathered
    # the other rule names an option of vLLM, because the default r is above vLLM's limit
    assert {rule.id for rule in new_plan.rules} == {"gathered-too-much", "vllm-max-lora-rank"}


def test_the_plan_has_the_values_that_the_json_sets(plan):
    new_plan = plan({
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1}, "fp16": {"enabled": True},
        "optimizer": {"params": {"lr": 1e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}},
    })  # fmt: skip
    layout, settings = new_plan.layout, new_plan.settings
    assert (layout.global_batch_size, layout.micro_batch_size, layout.zero_stage) == (64, 2, 1)
    assert (settings.lr, settings.weight_decay, settings.max_grad_norm) == (1e-4, 0.1, 0.5)
    assert new_plan.training_dtype == "float16"
    assert new_plan.with_data(sized(640)).learning_rate(0) <= 1e-4
    assert new_plan.deepspeed["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert new_plan.deepspeed["gradient_accumulation_steps"] == 4
    # run.yaml has these settings, so a plan made from it must be the same
    again = make_plan(settings, new_plan.shape, new_plan.hardware, nodes=1, ranks_per_node=8)
    assert again.deepspeed == new_plan.deepspeed


def test_hpz_and_offload_become_settings(write):
    settings = with_json_constraints(
        write(
            {
                "zero_optimization": {
                    "stage": 3,
                    "zero_hpz_partition_size": 8,
                    "offload_param": {"device": "cpu"},
                }
            }
        ),
        settings_of(),
    )
    assert (settings.zero_stage, settings.hpz_partition_size, settings.offload_param) == (
        3,
        8,
        "cpu",
    )


def test_an_empty_json_changes_nothing(write):
    settings, generated = settings_of(lr=1e-3), {"steps_per_print": None, "bf16": {"enabled": True}}
    path = write({"gradient_clipping": "auto", "zero_optimization": {"stage": None}, "bf16": None})
    assert with_json_constraints(path, settings) == settings
    assert overlay(generated, path) == generated | {"zero_optimization": {}}


@pytest.mark.parametrize(
    ("content", "settings", "facts"),
    [
        ({"optimizer": {"params": {"lr": 1e-4}}}, {"lr": 2e-4},
         ["ds.json:4", "optimizer.params.lr", "0.0001", "lr: 0.0002", "run file"]),
        ({"zero_optimization": {"stage": 2}}, {"zero_stage": 3},
         ["ds.json:3", "zero_optimization.stage", "zero_stage: 3"]),
        ({"train_batch_size": 64}, {"global_batch_size": 32},
         ["ds.json:2", "train_batch_size", "global_batch_size: 32"]),
        ({"bf16": {"enabled": True}}, {"bf16": False}, ["bf16.enabled", "bf16: false"]),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}, ["both are true"]),
        ({"zero_optimization": {"stage": 0}}, {}, ["ds.json:3", "equal to 1", "0"]),
        ({"train_batch_size": 64.5}, {}, ["train_batch_size", "must be a valid integer"]),
        ({"gradient_clipping": "1.0"}, {}, ["gradient_clipping", "valid number"]),
        ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, {}, ["device", "'cpu'"]),
    ],
)  # fmt: skip
def test_a_value_that_contradicts_the_run_file_is_refused(write, content, settings, facts):
    with refused(*facts):
        with_json_constraints(write(content), settings_of(**settings))


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ({"zero_optimisation": {}}, ["ds.json:2", "zero_optimization"]),
        ({"bfloat16": {"enabled": True}}, ["bfloat16", "bf16"]),
        ({"foo_bar": 1}, ["ds.json:2", "foo_bar"]),
        ({"zero_optimization": True}, ["ds.json:2", "block in braces"]),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, ["ds.json:3", "number"]),
        ({"steps": 1, "wandb": {"enabled": True}}, ["ds.json:2", "steps"]),
        ("{\n  \"bf16\": {\n}", ["ds.json:3", "JSON"]),
        ("[]", ["block in braces"]),
        ("[" * 9000, ["ds.json", "JSON"]),
        ('{"bf16": {"enabled": true},\n "fp16": {"enabled": false},\n "bf16": {}}',
         ["ds.json:3", "bf16", "line 1"]),
    ],
)  # fmt: skip
def test_a_json_that_deepspeed_cannot_use_is_refused_with_its_line(write, content, facts):
    generated = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}}
    with refused(*facts):
        overlay(generated, write(content))


@pytest.mark.parametrize("value", [1, "auto", None, {}, [], False])
@pytest.mark.parametrize(
    ("path", "near"),
    [
        (("gradient_clippin",), "gradient_clipping"),
        (("zero_optimization", "stage3_prefetch_buckt_size"), "stage3_prefetch_bucket_size"),
        (("zero_optimization", "max_live_parameter"), "max_live_parameters"),
        (("zero_optimization", "offload_param", "devise"), "device"),
        (("fp16", "loss_scal"), "loss_scale"),
        (("bf16", "enable"), "enabled"),
        (("data_types", "grad_accum_type"), "grad_accum_dtype"),
        (("optimizer", "parms"), "params"),
        (("optimizer", "params", "weight_deca"), "weight_decay"),
    ],
)
def test_a_mistyped_key_is_refused_whatever_its_value(write, path, near, value):
    content = value
    for key in reversed(path):
        content = {key: content}
    with refused(".".join(path), near):
        with_json_constraints(write(content), settings_of())


@pytest.mark.parametrize(
    "path",
    ["flops_profiler.enable", "tensorboard.output_paht", "activation_checkpointing.partition"],
)
def test_keys_of_monitoring_blocks_are_checked(write, path):
    block, key = path.split(".")
    with refused("ds.json:3", path):
        with_json_constraints(write({block: {key: "auto"}}), settings_of())


@pytest.mark.parametrize(
    ("path", "value", "fact"),
    [
        ("zero_optimization.reduce_bucket_size", -5, "whole number"),
        ("zero_optimization.sub_group_size", "1e9", "whole number"),
        ("zero_optimization.stage3_max_live_parameters", 0.5, "whole number"),
        ("zero_optimization.max_live_parameters", True, "whole number"),
        ("zero_optimization.round_robin_gradients", "true", "true or false"),
        ("communication_data_type", "fp33", "bf16"),
        ("data_types.grad_accum_dtype", "float", "fp32"),
        ("optimizer.params.betas", [0.9], "two numbers"),
        ("optimizer.params.betas", [0.9, 1], "two numbers"),
        ("optimizer.params.eps", 0, "above 0"),
        ("comms_logger", 3, "braces"),
        ("comms_logger.prof_ops", "all_reduce", "a list"),
        ("comms_logger.verbose", "yes", "true or false"),
        ("wandb.enabled", "yes please", "true or false"),
        ("wandb.project", 7, "text"),
        ("tensorboard.output_path", ["runs"], "text"),
        ("csv_monitor.job_name", {}, "text"),
        ("flops_profiler.profile_step", "five", "whole number"),
        ("comet.online", 1, "true or false"),
        ("activation_checkpointing.profile", "on", "true or false"),
    ],
)
def test_a_value_that_deepspeed_would_refuse_is_refused_with_its_line(write, path, value, fact):
    content = value
    for name in reversed(path.split(".")):
        content = {name: content}
    with refused(f"ds.json:{1 + len(path.split('.'))}", path, json.dumps(value), fact):
        with_json_constraints(write(content), settings_of())


@pytest.mark.parametrize("prefix", ["", "stage3_"])
def test_a_zero3_key_may_have_its_prefix_or_not(plan, write, prefix):
    keys = {"max_live_parameters": 5, "gather_16bit_weights_on_model_save": True,
            "param_persistence_threshold": "auto"}  # fmt: skip
    new_plan = plan({"zero_optimization": {"stage": 3} | {prefix + k: v for k, v in keys.items()}})
    zero = new_plan.deepspeed["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == 5
    assert zero["stage3_param_persistence_threshold"] > 0
    assert not keys.keys() & zero.keys()
    assert "json-no-effect" in [rule.id for rule in new_plan.rules]
    # an error has the key as written in the file
    with refused(f"ds.json:4: zero_optimization.{prefix}max_reuse_distance"):
        plan({"zero_optimization": {"stage": 3, f"{prefix}max_reuse_distance": "5"}})


def test_both_spellings_at_once_are_refused(write):
    text = '{"zero_optimization": {"max_live_parameters": 1,\n"stage3_max_live_parameters": 2}}'
    with refused("ds.json:1", "max_live_parameters", "stage3_max_live_parameters", "line 2"):
        with_json_constraints(write(text), settings_of())


def test_a_missing_file_is_refused(tmp_path):
    with refused("deepspeed_json", tmp_path / "none.json"):
        with_json_constraints(str(tmp_path / "none.json"), settings_of())


def test_blocks_are_merged_and_lists_replaced(write):
    generated = {"optimizer": {"type": "AdamW", "params": {"lr": 1.0, "betas": [0.9, 0.999]}}}
    content = {"optimizer": {"params": {"betas": [0.8, 0.9]}}, "wandb": {"enabled": True}}
    assert overlay(generated, write(content)) == {
        "optimizer": {"type": "AdamW", "params": {"lr": 1.0, "betas": [0.8, 0.9]}},
        "wandb": {"enabled": True},
    }
    assert generated["optimizer"]["params"]["betas"] == [0.9, 0.999]


def test_line_numbers_are_right_despite_colons_braces_and_equal_names(write):
    text = (
        '{"wandb": {"group": "a: {b}", "enabled": true},\n'
        ' "bf16": {\n  "enabled": 5}, "timers": [{"x": 1}, {"x": 2}]}'
    )
    with refused("ds.json:3: bf16.enabled"):
        with_json_constraints(write(text), settings_of())


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, "scheduler"),
        ({"elasticity": {"enabled": True}}, "removed-elasticity"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "removed-mics-shard-size"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload-optimizer"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme-not-yet"),
    ],
)
def test_rules_apply_to_known_keys(plan, content, rule):
    with refused(f"rule {rule}"):
        plan(content)


READ_BY_DEEPSPEED = """
import json, os, sys
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor import config as monitor
from deepspeed.runtime import config
from deepspeed.runtime import precision_config as precision
from deepspeed.runtime.zero import offload_config as offload
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig

keys_read = set()

class RecordingDict(dict):  # records the keys that are read
    def get(self, key, default=None):
        keys_read.add(key)
        return super().get(key, default)
    def __getitem__(self, key):
        keys_read.add(key)
        return super().__getitem__(key)
    def __contains__(self, key):
        keys_read.add(key)
        return super().__contains__(key)
    def keys(self):
        return self

config.DeepSpeedConfig(RecordingDict(train_micro_batch_size_per_gpu=1))
fields = DeepSpeedZeroConfig.model_fields.items()
removed, zero_removed = config._REMOVED_TOP_LEVEL_CONFIG_KEYS, config._REMOVED_ZERO_CONFIG_KEYS
print(json.dumps([
    sorted(keys_read - set(removed)), sorted(field.alias or name for name, field in fields),
    sorted(removed), sorted(zero_removed), sorted(n for n, f in fields if f.alias),
    {path: sorted(model.model_fields) for path, model in {
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "bf16": precision.DeepSpeedBF16Config, "fp16": precision.DeepSpeedFP16Config,
        "tensorboard": monitor.TensorBoardConfig, "wandb": monitor.WandbConfig,
        "csv_monitor": monitor.CSVConfig, "comet": monitor.CometConfig,
        "comms_logger": CommsLoggerConfig,
    }.items()},
    [(f.alias or name, f.annotation.__name__) for name, f in fields if f.annotation in (bool, int)],
]))
"""


def test_the_lists_of_keys_equal_those_of_the_installed_deepspeed():
    with Command("-c", READ_BY_DEEPSPEED) as command:
        code, output = command.end()
        ((printed, _),) = command.outputs
    assert code == 0, output
    top, zero, removed, zero_removed, short, blocks, types = json.loads(printed.splitlines()[-1])
    # "bfloat16" is an old name of bf16. "sequence_parallel_size" is read only if there is a
    # process group.
    assert {*top, "sequence_parallel_size"} - {"bfloat16"} == TOP_LEVEL
    assert set(zero) == ZERO_OPTIMIZATION
    assert set(removed) == REMOVED.keys()
    assert set(zero_removed) == REMOVED_FROM_ZERO.keys()
    assert set(short) == SHORT_NAMES.keys()
    for path, keys in blocks.items():
        assert set(keys) == set(BLOCKS[tuple(path.split("."))]), path
    for key, kind in types:
        is_listed = ("zero_optimization", key) in (FLAGS if kind == "bool" else WHOLE_NUMBERS)
        assert is_listed, f"{key} is {kind}"

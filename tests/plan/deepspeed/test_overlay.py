"""A user's DeepSpeed JSON: the settings that it sets, its merge, and refusals with line numbers.

The file is an overlay: its values replace those of the DeepSpeed config that the plan generates.
"""

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
    """Function that writes ds.json, one key a line unless `content` is text; returns its path."""

    def to_file(content) -> str:
        path = tmp_path / "ds.json"
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return to_file


@pytest.fixture
def plan(tmp_path, write):
    """Function that plans a run of SmolLM2 on 8 GPUs with this DeepSpeed JSON."""

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
    # With a stage3_max_live_parameters of 1e9, all of this base stays gathered. The other rule has
    # an option of vLLM, because the default lora_r is above vLLM's limit.
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
    # The folder of a run stores these settings, so a plan made from them must be the same.
    plan_of_resumed_run = make_plan(
        settings, new_plan.shape, new_plan.hardware, nodes=1, ranks_per_node=8
    )
    assert plan_of_resumed_run.deepspeed == new_plan.deepspeed


def test_hpz_and_offload_of_the_json_become_settings(write):
    zero = {"stage": 3, "zero_hpz_partition_size": 8, "offload_param": {"device": "cpu"}}
    settings = with_json_constraints(write({"zero_optimization": zero}), settings_of())
    assert settings.zero_stage == 3
    assert settings.hpz_partition_size == 8
    assert settings.offload_param == "cpu"


def test_values_auto_and_null_change_nothing(write):
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
def test_a_value_that_is_invalid_or_contradicts_the_run_file_is_refused(
    write, content, settings, facts
):
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


def nested(path, value):
    """Mappings that have this value under this path of keys."""
    for key in reversed(path):
        value = {key: value}
    return value


@pytest.mark.parametrize("value", [1, "auto", None, {}, [], False])
@pytest.mark.parametrize(
    ("path", "correct_key"),
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
def test_a_mistyped_key_is_refused_with_the_correct_key_for_every_value(
    write, path, correct_key, value
):
    with refused(".".join(path), correct_key):
        with_json_constraints(write(nested(path, value)), settings_of())


@pytest.mark.parametrize(
    "path",
    ["flops_profiler.enable", "tensorboard.output_paht", "activation_checkpointing.partition"],
)
def test_a_mistyped_key_of_monitoring_and_profiling_is_refused(write, path):
    with refused("ds.json:3", path):
        with_json_constraints(write(nested(path.split("."), "auto")), settings_of())


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
    keys = path.split(".")
    line = 1 + len(keys)  # line 1 is the opening brace
    with refused(f"ds.json:{line}", path, json.dumps(value), fact):
        with_json_constraints(write(nested(keys, value)), settings_of())


@pytest.mark.parametrize("prefix", ["", "stage3_"])
def test_a_key_of_zero3_may_have_the_prefix_stage3_or_not(plan, prefix):
    zero = {
        "stage": 3,
        f"{prefix}max_live_parameters": 5,
        f"{prefix}gather_16bit_weights_on_model_save": True,
        f"{prefix}param_persistence_threshold": "auto",
    }
    new_plan = plan({"zero_optimization": zero})
    planned_zero = new_plan.deepspeed["zero_optimization"]
    assert planned_zero["stage3_max_live_parameters"] == 5
    assert planned_zero["stage3_param_persistence_threshold"] > 0
    assert "max_live_parameters" not in planned_zero
    assert "param_persistence_threshold" not in planned_zero
    # The run gathers no weights for DeepSpeed's checkpoints.
    assert "json-no-effect" in [rule.id for rule in new_plan.rules]


@pytest.mark.parametrize("prefix", ["", "stage3_"])
def test_a_message_has_the_key_as_the_file_has_it(plan, prefix):
    with refused(f"ds.json:4: zero_optimization.{prefix}max_reuse_distance"):
        plan({"zero_optimization": {"stage": 3, f"{prefix}max_reuse_distance": "5"}})


def test_a_key_both_with_and_without_its_prefix_is_refused(write):
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
def test_a_key_that_training_cannot_use_is_refused_by_a_rule(plan, content, rule):
    with refused(f"rule {rule}"):
        plan(content)


# Prints the keys that the installed DeepSpeed reads, as JSON.
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
removed, removed_zero = config._REMOVED_TOP_LEVEL_CONFIG_KEYS, config._REMOVED_ZERO_CONFIG_KEYS
print(json.dumps({
    "top_level": sorted(keys_read - set(removed)),
    "zero": sorted(field.alias or name for name, field in fields),
    "removed": sorted(removed),
    "removed_zero": sorted(removed_zero),
    "without_prefix": sorted(name for name, field in fields if field.alias),
    "blocks": {path: sorted(model.model_fields) for path, model in {
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "bf16": precision.DeepSpeedBF16Config, "fp16": precision.DeepSpeedFP16Config,
        "tensorboard": monitor.TensorBoardConfig, "wandb": monitor.WandbConfig,
        "csv_monitor": monitor.CSVConfig, "comet": monitor.CometConfig,
        "comms_logger": CommsLoggerConfig,
    }.items()},
    "types": {
        field.alias or name: field.annotation.__name__
        for name, field in fields if field.annotation in (bool, int)
    },
}))
"""


def test_the_lists_of_keys_equal_those_of_the_installed_deepspeed():
    with Command("-c", READ_BY_DEEPSPEED) as command:
        code, output = command.wait_for_end()
        ((standard_output, _),) = command.outputs
    assert code == 0, output
    keys = json.loads(standard_output.splitlines()[-1])
    # "bfloat16" is an old name of bf16. "sequence_parallel_size" is read only if there is a
    # process group.
    assert {*keys["top_level"], "sequence_parallel_size"} - {"bfloat16"} == TOP_LEVEL
    assert set(keys["zero"]) == ZERO_OPTIMIZATION
    assert set(keys["removed"]) == REMOVED.keys()
    assert set(keys["removed_zero"]) == REMOVED_FROM_ZERO.keys()
    assert set(keys["without_prefix"]) == SHORT_NAMES.keys()
    for path, keys_of_block in keys["blocks"].items():
        assert set(keys_of_block) == set(BLOCKS[tuple(path.split("."))]), path
    for key, type_name in keys["types"].items():
        keys_of_type = FLAGS if type_name == "bool" else WHOLE_NUMBERS
        assert ("zero_optimization", key) in keys_of_type, f"{key} is {type_name}"
